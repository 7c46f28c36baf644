"""Directions in host memory, brought back one parameter at a time; the next one travels while this one is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from assay.capture.held import Held, number_of

__all__ = ["Conveyor", "OnHost"]


@dataclass
class Conveyor:
    """Moves tensors between a device and the host beside what the device computes; one for all steps of a run.

    Copies run on a stream of their own, from and to pinned memory, on CUDA; on another device they block, and from a
    CPU nothing is moved.

    Attributes:
        follows: which parameter was asked for after which one: what will be asked for next.
    """

    follows: dict[Parameter, Parameter] = field(default_factory=dict)
    _streams: dict[torch.device, Any] = field(default_factory=dict)

    def away(self, x: Tensor) -> Tensor:
        """To the host; read it through `start` only."""
        if x.device.type == "cpu":
            return x
        if x.device.type != "cuda":
            return x.to("cpu")
        stream = self._stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        with torch.cuda.stream(stream):
            host.copy_(x, non_blocking=True)
        x.record_stream(stream)  # its memory is not given to others before the copy is done
        return host

    def start(self, host: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        """Begin to bring a tensor back: the tensor, and what `arrived` waits for."""
        if device.type != "cuda":
            return host.to(device), None
        stream = self._stream(device)
        with torch.cuda.stream(stream):  # in the order of the copies before it, `away` among them
            x = host.to(device, non_blocking=True)
            return x, stream.record_event()

    def arrived(self, x: Tensor, event: Any) -> Tensor:
        """The tensor, for what the device computes from here on; the host does not wait."""
        if event is not None:
            present = torch.cuda.current_stream(x.device)
            present.wait_event(event)
            x.record_stream(present)
        return x

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]


class OnHost(Held):
    """In host memory; on a CPU they stay where they are.

    Args:
        gradient: `{parameter: [targets, *shape]}`, which is emptied on the way.
        conveyor: moves them.

    Example:
        >>> w = Parameter(torch.zeros(2))
        >>> OnHost({w: torch.tensor([[1.0, 2.0]])}, Conveyor())[w]
        tensor([[1., 2.]])
    """

    def __init__(self, gradient: dict[Parameter, Tensor], conveyor: Conveyor) -> None:
        self.targets, self._conveyor = number_of(gradient), conveyor
        self._device = {p: g.device for p, g in gradient.items()}
        self._host = {p: conveyor.away(gradient.pop(p)) for p in list(gradient)}
        self._last: Parameter | None = None
        self._coming: tuple[Parameter, Tensor, Any] | None = None

    def __getitem__(self, param: Parameter) -> Tensor:
        host, conveyor = self._host[param], self._conveyor
        if self._device[param] == host.device:
            return host
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] is param:
            _, x, event = coming
        else:
            x, event = conveyor.start(host, self._device[param])
        if self._last is not None:
            conveyor.follows[self._last] = param
        self._last = param
        following = conveyor.follows.get(param)
        if following is not None and following is not param and following in self._host:
            self._coming = following, *conveyor.start(self._host[following], self._device[following])
        return conveyor.arrived(x, event)

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self._host)

    def __len__(self) -> int:
        return len(self._host)

    def bytes(self) -> int:
        """What is on the device: nothing, or all of it on a CPU."""
        return sum(x.nbytes for p, x in self._host.items() if x.device == self._device[p])
