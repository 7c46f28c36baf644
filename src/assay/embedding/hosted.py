"""Tensors on their way from the device to the host, without the training waiting for them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Hosted"]


class Hosted:
    """A copy in the host's memory, queued behind what the device is at; another thread waits for it.

    Args:
        tensor: on any device. On a GPU the copy goes into pinned memory; elsewhere it is made at once, and a tensor of
            the host is taken as it is.

    Example:
        >>> Hosted(torch.ones(2)).wait()
        tensor([1., 1.])
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._host = tensor.cpu()
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """The copy, once it is whole."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._host
