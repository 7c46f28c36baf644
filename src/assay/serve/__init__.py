"""A local explorer of a run: which training documents stand behind a text, and what each was worth."""

from assay.serve.app import make_app
from assay.serve.search import Searcher, make_searcher

__all__ = ["Searcher", "make_app", "make_searcher"]
