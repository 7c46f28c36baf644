"""Linear datamodeling scores of the influence index."""
