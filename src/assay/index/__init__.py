"""The influence index: projected gradients of a checkpoint's examples, and the queries over them."""

from assay.index.average import average_influence
from assay.index.index import Index

__all__ = ["Index", "average_influence"]
