"""Names of samples that survive shuffling, workers and epochs: the user's own, or a hash of the content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from assay.errors import InputError

__all__ = ["content_id"]


def content_id(example: Any) -> str:
    """Name an example by its content: 16 hexadecimal digits of SHA-256.

    The same numbers give the same name whether they lie in lists, arrays or tensors, and whatever their precision.

    Args:
        example: numbers, text, arrays, tensors, images, or mappings and sequences of them.

    Raises:
        InputError: something in it has no content that could be read.

    Example:
        >>> import torch
        >>> content_id({"input_ids": [1, 2]}) == content_id({"input_ids": torch.tensor([1, 2])})
        True
        >>> content_id([1, 2]) == content_id([2, 1])
        False
    """
    digest = hashlib.sha256()
    for part in _parts(example):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


def _parts(value: Any) -> Iterator[bytes]:
    if value is None:
        yield b"none"
    elif isinstance(value, str):
        yield value.encode("utf-8", "surrogatepass")
    elif isinstance(value, bytes):
        yield value
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield str(key).encode()
            yield from _parts(value[key])
    else:
        array = _array(value)
        if array is not None:
            yield repr(array.shape).encode()
            yield array.tobytes()
        elif isinstance(value, list | tuple):
            yield str(len(value)).encode()
            for item in value:
                yield from _parts(item)
        else:
            raise InputError(
                f"an example holds {type(value).__name__}, which has no content to name it by: "
                "name the examples yourself, by id="
            )


def _array(value: Any) -> np.ndarray[Any, Any] | None:
    """Numbers in one precision per kind; None for what is no array of numbers."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value
    try:
        array = np.asarray(value)
    except (ValueError, TypeError):  # ragged
        return None
    if array.dtype.kind in "biu":
        return np.ascontiguousarray(array, dtype=np.int64)
    return np.ascontiguousarray(array, dtype=np.float64) if array.dtype.kind == "f" else None
