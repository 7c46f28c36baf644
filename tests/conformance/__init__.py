"""Many architectures, one comparison: what the capture says of a sample against autograd on that sample alone."""
