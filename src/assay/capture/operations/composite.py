"""Functions that torch writes in Python from smaller ones (`F.multi_head_attention_forward`): seen one by one.

Such a function hands itself over to the capture before its body runs. Its body is run here with that hand-over
switched off, so that every operation inside is seen on its own: the same code, the same mathematics.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

from assay.capture.call import Call

__all__ = ["open_composite"]

_HAND_OVER = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def open_composite(call: Call) -> Any:
    """The result of a composite function with its operations seen one by one; `NotImplemented` for any other."""
    body = _body(call.func)
    if body is None:
        return NotImplemented
    with call.capture:
        return body(*call.args, **call.kwargs)


@lru_cache(maxsize=256)
def _body(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function without its hand-over, or None if it has none."""
    if not isinstance(func, FunctionType) or not set(_HAND_OVER) & set(func.__code__.co_names):
        return None
    scope = {**func.__globals__, **dict.fromkeys(_HAND_OVER, lambda *_: False)}
    body = FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body
