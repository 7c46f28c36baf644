"""Compiled models stay compiled in a step: the capture steps in between Dynamo and the user's compiler."""

from assay.capture.compiled.parts import CompiledParts

__all__ = ["CompiledParts"]
