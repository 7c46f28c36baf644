"""The influence index: projected gradients of a checkpoint's examples, and the queries over them."""

from assay.index.index import Index

__all__ = ["Index"]
