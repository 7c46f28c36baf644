"""Commands that measure assay and keep what they found as JSON."""
