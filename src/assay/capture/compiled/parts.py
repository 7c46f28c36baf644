"""The compiled parts of a model, and what runs in their place while a step is captured.

A compiler cannot trace through the capture, which sees torch functions in Python. So inside a step every compiled part
(what `torch.compile(module)` returns, and a module after `module.compile()`) is compiled once more from the same code
by the same compiler, with the capture in between Dynamo and that compiler (`region`). Where this is not possible, the
part runs eagerly under the capture, and a warning says so once.
"""

from __future__ import annotations

import gc
import logging
import sys
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import Module
from torch.overrides import _get_current_function_mode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves

from assay.capture.compiled.reasons import CannotCompileError
from assay.capture.compiled.region import Compiler, Region
from assay.capture.mode import Capture
from assay.errors import AssayWarning

__all__ = ["CompiledParts"]

SHAPES = 4  # of a part's inputs that are compiled; a further one runs eagerly


class CompiledParts:
    """Puts the compiled parts of a model into a form that the capture can follow.

    Args:
        model: the model, compiled or not, in whole or in parts.

    Attributes:
        capture: that of the step that runs.
    """

    def __init__(self, model: Module) -> None:
        self._model = model
        self._parts: dict[Module, _Part] = {}
        self._backends: list[_Backend] = []
        self._outer: Any = None  # settings of a compiled wrapper around the model
        self._looked = self._warned = False
        self.capture: Capture | None = None

    @contextmanager
    def followed(self, capture: Capture) -> Iterator[bool]:
        """Around the forward and backward pass of one micro-batch; whether any part of the model is compiled."""
        if "torch._dynamo" not in sys.modules:
            yield False
            return
        parts = self._present()
        self.capture = capture
        with torch.compiler.set_stance("force_eager"):
            for part in parts:
                part.open()
            try:
                yield bool(parts)
            finally:
                self.capture = None
                for part in parts:
                    part.close()

    def notice(self) -> None:
        """In a forward pass of the model: look once for what compiled code it is called from.

        A wrapper around the model, beside which the user kept the model itself, is followed from the next micro-batch
        on. A compiled function of the user's own cannot be.
        """
        if self._looked or "torch._dynamo" not in sys.modules:
            return
        frame = sys._getframe(1)
        while frame.f_back is not None:
            frame = frame.f_back
            if frame.f_code.co_name == "compile_wrapper":
                self._looked = True
                self._outer = _settings_of_wrapper(self._model)
                if self._outer is None and not self._parts:
                    self.warn(
                        "function around the model",
                        "assay follows compiled modules only; compile the model itself, not the function that calls it",
                    )
                return

    def current(self) -> Capture:
        """The capture of the step that runs."""
        if self.capture is None:
            raise CannotCompileError("it was called outside of the step")
        return self.capture

    def backend(self, compiler: Compiler) -> _Backend:
        """One for each of the user's compilers: parts with the same code and compiler share their graphs."""
        for backend in self._backends:
            if backend.compiler == compiler:
                return backend
        self._backends.append(_Backend(compiler, self.current))
        return self._backends[-1]

    def warn(self, name: str, reason: str) -> None:
        """Say once that something compiled runs eagerly."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the compiled {name} runs eagerly inside run.step: {reason}. The values are the same; its forward and "
                "backward pass take as long as without torch.compile.",
                AssayWarning,
                stacklevel=2,
            )

    def _present(self) -> list[_Part]:
        """The outermost compiled parts."""
        found = {self._model: self._outer} if self._outer is not None else {}
        inside: set[Module] = set(self._model.modules()) if found else set()
        for module in self._model.modules():
            target, settings = _settings(module)
            if settings is not None and target not in inside:
                found[target] = settings
                inside.update(target.modules())
        for module, settings in found.items():
            if module not in self._parts:
                self._parts[module] = _Part(module, settings, self)
        return [self._parts[module] for module in found]


class _Backend:
    """What Dynamo hands its graphs to: a region for each, with the user's own compiler."""

    def __init__(self, compiler: Compiler, current: Callable[[], Capture]) -> None:
        self.compiler, self._current = compiler, current

    def __call__(self, graph: GraphModule, inputs: Sequence[Any]) -> Region:
        return Region(graph, self.compiler, self._current)


class _Part:
    """One compiled module: in a step its `forward` is `call`, with all hooks outside of it.

    Args:
        module: the module itself, not the wrapper around it.
        settings: of the user's `torch.compile`.
        parts: all of them.
    """

    def __init__(self, module: Module, settings: Any, parts: CompiledParts) -> None:
        self.module, self._settings, self._parts = module, settings, parts
        self.gave_up = ""  # why it runs eagerly from now on
        self._compiled: Callable[..., Any] | None = None
        self._shapes: set[Hashable] = set()

    def open(self) -> None:
        """Take the place of the module's forward."""
        self._own = self.module.__dict__.get("forward")
        self._forward = self.module.forward
        self.module.__dict__["forward"] = self._call

    def close(self) -> None:
        """Put it back."""
        if self._own is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self._own

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        capture = self._parts.capture
        mode: Any = _get_current_function_mode()  # type: ignore[no-untyped-call]
        if capture is None or capture is not mode or capture.paused or self.gave_up:
            return self._forward(*args, **kwargs)
        reason = self._too_many(args, kwargs)
        if not reason:
            try:
                return self._run(capture, args, kwargs)
            except _refusals() as error:
                self.gave_up = reason = _first_line(error)
            except Exception as error:
                if not capture.faults.detaches:
                    raise
                out = self._forward(
                    *args, **kwargs
                )  # where the model itself was wrong, this raises its error
                self.gave_up = _first_line(error)
                capture.fault("in the forward pass", error)
                return out
        self._parts.warn(type(self.module).__name__, reason)
        return self._forward(*args, **kwargs)

    def _run(self, capture: Capture, args: Any, kwargs: Any) -> Any:
        if capture.weights.uncovered:
            raise CannotCompileError(
                "a fallback measures some of its parameters, which it can do eagerly only"
            )
        if self._compiled is None:
            self._compiled = self._compile()
        with (
            _pop_mode_temporarily(),
            torch.compiler.set_stance("default"),
            torch._dynamo.config.patch(ignore_logging_functions=_logging()),
        ):
            return self._compiled(*args, **kwargs)

    def _too_many(self, args: Any, kwargs: Any) -> str:
        shapes = tuple(tuple(x.shape) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        if shapes not in self._shapes and len(self._shapes) == SHAPES:
            return (
                f"its inputs come in more than {SHAPES} shapes, and it is compiled for the first {SHAPES} only (pad "
                "the batches to a few lengths to keep it compiled)"
            )
        self._shapes.add(shapes)
        return ""

    def _compile(self) -> Callable[..., Any]:
        """The same code by the same compiler, with a region in between; one graph, or none."""
        try:
            compiler = torch._dynamo.eval_frame.innermost_backend(self._settings.callback)
            backend = self._parts.backend(compiler)
            return torch.compile(self._forward, backend=backend, fullgraph=True, dynamic=False)
        except (AttributeError, RuntimeError, AssertionError) as error:
            raise CannotCompileError(_first_line(error)) from error


def _settings(module: Module) -> tuple[Module, Any]:
    """A module, or the one inside a compiled wrapper, and what it was compiled with (None if it was not)."""
    if type(module).__name__ == "OptimizedModule":
        return module._modules["_orig_mod"], module.__dict__["dynamo_ctx"]  # type: ignore[return-value]
    compiled: Any = module._compiled_call_impl
    if compiled is None:
        return module, None
    cells = zip(compiled.__code__.co_freevars, compiled.__closure__ or (), strict=True)
    return module, dict(cells)["self"].cell_contents


def _settings_of_wrapper(model: Module) -> Any:
    """What a compiled wrapper around the model was made with."""
    kind = torch._dynamo.eval_frame.OptimizedModule
    for thing in gc.get_referrers(kind):  # its instances are among them
        if type(thing) is kind and thing._modules["_orig_mod"] is model:
            return thing.dynamo_ctx
    return None


def _refusals() -> tuple[type[Exception], ...]:
    exc = torch._dynamo.exc
    return CannotCompileError, exc.TorchDynamoException, exc.FailOnRecompileLimitHit


def _logging() -> set[Any]:
    """What is said while a model runs is no reason to break its graph."""
    names = ("debug", "info", "warning", "error", "warning_once", "info_once", "log")
    return {getattr(logging.Logger, name) for name in names if hasattr(logging.Logger, name)}


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
