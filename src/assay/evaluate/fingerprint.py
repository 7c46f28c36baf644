"""Whether two functions, models or data are the same, told by a hash that every process finds alike."""

from __future__ import annotations

import dataclasses
import dis
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves

__all__ = ["called", "fingerprint"]

PLAIN = (
    type(None), bool, int, float, complex, str, range, slice, type(...), torch.dtype, torch.device, np.generic,
)  # fmt: skip
RUNTIME = frozenset({"torch", *sys.stdlib_module_names})


def called(function: Callable[..., Any]) -> str:
    """A function's name and fingerprint, for settings that are read by people.

    Example:
        >>> called(partial(pow, 2)).split()[0]
        'partial(builtins.pow)'
    """
    return f"{_name(function)} {fingerprint(function)}"


def fingerprint(*values: Any) -> str:
    """16 hexadecimal digits of SHA-256 of what the values are made of; no address and no order of a set is in it.

    - Numbers, texts, arrays and tensors count by content, type and shape; containers and dataclasses by what they hold.
    - A function counts by its name, its code (not by its place in a file), its defaults, what its closure holds
      and the globals that it reads; a partial or a method by its parts, a wrapper by what it wraps.
    - A module counts by its classes, settings, parameters and buffers, with names, shapes and values bit for bit; an
      object that can be called by its methods and attributes.

    It does not see code of installed packages, of torch and of Python (known by name), what a function reaches through
    an attribute, a module or a class, and what any other object holds (known by its class). It tells apart more than it
    need where another version of Python compiles to other code, another processor draws weights with other last bits,
    or a function counts its own calls.

    Example:
        >>> fingerprint(torch.zeros(2, 3)) == fingerprint(torch.zeros(2, 3))
        True
        >>> fingerprint(torch.zeros(2, 3)) == fingerprint(torch.zeros(3, 2))
        False
    """
    reader = _Reader()
    digests = [reader.of(values)]
    digests += (reader.body(found) for found in reader.found)  # which grows as bodies are read
    return _joined(digests).hex()[:16]


class _Reader:
    """What holds others is numbered as it is met and read later, so that functions may call one another."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self._numbers: dict[int, int] = {}  # by address; `found` keeps it from being given to another

    def of(self, value: Any) -> bytes:
        """The digest of a value."""
        return _joined([_name(type(value)).encode(), *self._parts(value)])

    def _parts(self, value: Any) -> Iterable[bytes]:
        if isinstance(value, Enum):
            return [value.name.encode()]
        if isinstance(value, PLAIN):
            return [repr(value).encode("utf-8", "surrogatepass")]
        if isinstance(value, bytes | bytearray):
            return [bytes(value)]
        if isinstance(value, Tensor):
            return [f"{value.dtype} {tuple(value.shape)}".encode(), _content(value)]
        if isinstance(value, np.ndarray):
            content = self.of(value.tolist()) if value.dtype.hasobject else value.tobytes()
            return [f"{value.dtype} {value.shape}".encode(), content]
        if isinstance(value, Mapping):
            return sorted(_joined([self.of(k), self.of(v)]) for k, v in value.items())
        if isinstance(value, set | frozenset):
            return sorted(map(self.of, value))
        if isinstance(value, list | tuple):
            return [self.of(item) for item in value]
        if isinstance(value, CodeType):
            arguments = value.co_varnames[: value.co_argcount + value.co_kwonlyargcount]
            names = (arguments, value.co_names, value.co_freevars)
            return [value.co_code, self.of(names), self.of(value.co_consts)]
        if isinstance(value, partial):
            return [self.of((value.func, value.args, value.keywords))]
        if isinstance(value, MethodType):
            return [self.of((value.__func__, value.__self__))]
        if isinstance(value, type | ModuleType):
            return [_name(value).encode()]
        if isinstance(value, FunctionType | Module) or dataclasses.is_dataclass(value) or callable(value):
            number = self._numbers.setdefault(id(value), len(self.found))
            if number == len(self.found):
                self.found.append(value)
            return [str(number).encode()]
        leaves = tree_leaves(value)  # of a container that torch knows
        return [] if len(leaves) == 1 and leaves[0] is value else [self.of(leaves)]

    def body(self, value: Any) -> bytes:
        """The digest of what a function, a module or another object is made of."""
        parts: list[Any] = [_name(value)]
        if isinstance(value, FunctionType):
            parts += [value.__defaults__, value.__kwdefaults__, [*_cells(value)]]
            parts += (
                [] if _installed(value.__globals__.get("__name__")) else [value.__code__, _read_by(value)]
            )
        elif isinstance(value, Module):
            for name, module in value.named_modules():
                settings = {k: v for k, v in vars(module).items() if not k.startswith("_")}
                parts += [name, type(module), _methods(type(module)), settings]
            parts.append(list(value.named_parameters(remove_duplicate=False)))
            parts.append(list(value.named_buffers(remove_duplicate=False)))
        else:
            parts += [_methods(type(value)) if callable(value) else {}, _attributes(value)]
        return self.of(parts)


def _joined(parts: Iterable[bytes]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _name(value: Any) -> str:
    """`module.qualname` of a function or class, of an object that of its class."""
    if isinstance(value, partial):
        return f"partial({_name(value.func)})"
    if isinstance(value, ModuleType):
        return value.__name__
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', None) or 'builtins'}.{named.__qualname__}"


def _content(x: Tensor) -> bytes:
    """The bytes of a tensor; none where it has no memory."""
    if x.device.type == "meta":
        return b""
    x = x.detach().cpu()
    x = (x if x.layout == torch.strided else x.to_dense()).resolve_conj().resolve_neg()
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _cells(function: FunctionType) -> Iterator[Any]:
    """What a closure holds; a variable that is not set yet holds nothing."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:
            yield None


def _read_by(function: FunctionType) -> dict[str, Any]:
    """The globals that a function's code reads, that of the functions within it too."""
    names, waiting = set[str](), [function.__code__]
    for code in waiting:
        names |= {str(i.argval) for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
        waiting += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}


def _methods(kind: type) -> dict[str, FunctionType]:
    """A class's functions, inherited ones too, but for those of installed packages."""
    bases = [base for base in reversed(kind.__mro__) if not _installed(base.__module__)]
    return {k: v for base in bases for k, v in vars(base).items() if isinstance(v, FunctionType)}


def _attributes(value: Any) -> dict[str, Any]:
    """A dataclass's fields, or the attributes of an object that can be called; torch's keep what passes by."""
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    wrapped = {"__wrapped__": value.__wrapped__} if hasattr(value, "__wrapped__") else {}
    own = type(value).__module__.partition(".")[0] not in RUNTIME
    return {**(getattr(value, "__dict__", {}) if own else {}), **wrapped}


def _installed(module: str | None) -> bool:
    """Whether a module belongs to an installed package, to torch or to Python itself."""
    top = (module or "").partition(".")[0]
    return top in RUNTIME or "-packages" in (getattr(sys.modules.get(top), "__file__", None) or "")
