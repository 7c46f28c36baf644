"""In-Run Data Shapley: what each example contributed to this very run (Wang et al., arXiv 2406.11011).

Step t moves the weights by Δ_t = −K_t Σ_i g_i + (momentum carried over, weight decay), with K_t the optimizer's own
diagonal. The value of sample i at step t is its part of the fall of the target's loss along that move,

    v_i = ∫_0^1 ∇ℓ_val(w_t + s Δ_t)ᵀ K_t g_i ds          (positive: the sample lowered the target's loss)

and its value to the run is Σ_t v_i. `path` says how the integral is taken:

    left        ∇ℓ_val(w_t)                              the paper's first order (section 4.1, ghost dot-product)
    hessian     ∇ℓ_val(w_t) + ½ H_val Δ_t                the paper's second order (section 4.2), see `hessian`
    trapezoid   ½ (∇ℓ_val(w_t) + ∇ℓ_val(w_{t+1}))        the right end is the next step's left end
    simpson     (left + 4 middle + right) / 6            see `quadrature`

The account of the step sets Σ_i v_i, the part carried over by momentum and the part of the weight decay, all by the
same quadrature, against the measured change ℓ_val(w_t) − ℓ_val(w_{t+1}).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from assay.errors import InputError
from assay.methods.base import Context
from assay.methods.gradient import FORMS
from assay.methods.quadrature import Quadrature
from assay.methods.session import InRunSession
from assay.targets import Target

__all__ = ["InRunShapley"]

PATHS = ("left", "hessian", "trapezoid", "simpson")
MOMENTUM = ("instant", "sketch", "exact")
MEMORY = ("keep", "reduced", "recompute")


class InRunShapley:
    """In-Run Data Shapley values of every sample for every target, computed while the model trains.

    Args:
        targets: name → `Target`, or one `Target` (named "target").
        path: how the value's integral along the step is taken. "left" is the paper's first order, one validation
            gradient per step; "hessian" its second order, with one Hessian-vector product more; "trapezoid" is of
            second order without a Hessian and needs the per-sample gradients kept until the next step begins;
            "simpson" adds one validation gradient per step.
        momentum: "instant" credits a gradient's effect in its own step and books what momentum carries over to later
            steps on the account's line `carried`. "exact" and "sketch" share that line out to the samples that it
            comes from, as values at the later step: "exact" keeps all per-sample gradients of the horizon, "sketch"
            a random projection of each.
        granularity: "sample", or "token" to take every value apart by position as well, in `ledger.tokens()`: the
            part of g_i that flows through the weights' uses at each position of dimension 1 of the model's inputs,
            and what has none. A sample's tokens add up to its value. Needs momentum="instant".
        memory: what waits for the gradient that values the step, where that comes after the backward pass. "keep": the
            per-sample gradients. "reduced" (with "trapezoid" and "simpson"): the left end is taken in full, and
            gradients in bfloat16 wait for the rest; a step's total stays exact, its division among the samples is off
            by about 1e-3 of the correction. "recompute": the inputs of the model's forward passes alone, which are
            taken again, forward and backward, with the same random numbers; needs a model whose parameters are used
            in its own forward pass only, and momentum="instant". On the first micro-batch the start-up check of
            `Run` keeps everything (`check="off"` does not).
        refresh: the target's gradient is taken anew every so many steps (1: at every one) and serves all of them, which
            saves that share of the validation passes. The losses between are not known, so that the account has one row
            per block of steps, at its last one; the table "refresh" says how far values by a gradient of that age are
            from fresh ones. Needs path="left" and momentum="instant".
        target_gradient: how a target's gradient, a copy of the weights, is held until it is contracted. "full": as
            autograd gives it. "bfloat16": in half the memory, widened one parameter at a time; values are off by about
            1e-3 of their spread. "cpu": in pinned host memory, brought back one parameter at a time while the one
            before it is read; on a CPU nothing moves. "factors": for linear layers and embeddings the activations and
            output gradients of the validation pass, wherever these are smaller than the gradient (few validation
            positions, wide layers), contracted with the samples' own or written out one parameter at a time; exact,
            in one process, a compiled model's validation pass runs eagerly, not with "hessian". All but "full" also
            save the copy that the optimizer's preconditioner makes of it, at the price of forming that again for
            every micro-batch.
        tolerance: the largest |residual| / |actual| of a step that is left alone; other steps get more points (with
            "trapezoid" and "simpson"). The ledger's table "quadrature" says how many.
        max_points: no step gets more points than this.
        horizon: for how many steps momentum is followed; as many as carry 99 % of it if left out.
        sketch: how many numbers stand for one per-sample gradient.
        band: explained shares of the loss's change outside it draw a warning.

    Raises:
        InputError: an unknown choice, or no target.

    Example:
        >>> target = Target([None], lambda model, batch: model.weight.sum())
        >>> InRunShapley({"sum": target}, path="simpson", tolerance=0.02).target_names
        ['sum']
    """

    several_processes = resumes = True

    def __init__(
        self,
        targets: Mapping[str, Target] | Target,
        path: str = "left",
        momentum: str = "instant",
        *,
        granularity: str = "sample",
        memory: str = "keep",
        tolerance: float | None = None,
        max_points: int = 17,
        horizon: int | None = None,
        sketch: int = 4093,
        band: tuple[float, float] = (0.8, 1.25),
        refresh: int = 1,
        target_gradient: str = "full",
    ) -> None:
        self.targets = {"target": targets} if isinstance(targets, Target) else dict(targets)
        if not self.targets:
            raise InputError(
                "InRunShapley(targets=...): there is no target; give at least one name → Target."
            )
        for name, target in self.targets.items():
            if not isinstance(target, Target):
                raise InputError(
                    f"InRunShapley: target {name!r} must be an assay.Target, not {type(target).__name__}."
                )
        self.path = _choice("path", path, PATHS)
        self.momentum = _choice("momentum", momentum, MOMENTUM)
        self.granularity = _choice("granularity", granularity, ("sample", "token"))
        if granularity == "token" and momentum != "instant":
            raise InputError(
                f"InRunShapley(granularity='token', momentum={momentum!r}): what momentum brings to later steps is not "
                "taken apart by token; choose momentum='instant'."
            )
        self.memory = _choice("memory", memory, MEMORY)
        _check_memory(memory, path, momentum, granularity)
        self.target_gradient = _choice("target_gradient", target_gradient, FORMS)
        if target_gradient == "factors" and path == "hessian":
            raise InputError(
                "InRunShapley(target_gradient='factors', path='hessian'): a Hessian's product has no factors of the "
                "validation pass; choose path='trapezoid', or target_gradient='bfloat16'."
            )
        if tolerance is not None and path not in ("trapezoid", "simpson"):
            raise InputError(
                f"InRunShapley(tolerance={tolerance!r}) cannot be met by path={path!r}, which takes no further points; "
                "choose path='trapezoid' or 'simpson'."
            )
        if tolerance is not None and not tolerance > 0:
            raise InputError(f"InRunShapley(tolerance={tolerance!r}) must be above 0, such as 0.02.")
        for argument, least, value in (
            ("refresh", 1, refresh),
            ("max_points", 3, max_points),
            ("sketch", 1, sketch),
            ("horizon", 1, horizon),
        ):
            if value is not None and not (isinstance(value, int) and value >= least):
                raise InputError(
                    f"InRunShapley({argument}={value!r}) must be a whole number from {least} on."
                )
        if refresh > 1 and (path != "left" or momentum != "instant"):
            raise InputError(
                f"InRunShapley(refresh={refresh}, path={path!r}, momentum={momentum!r}): the other paths and shared "
                "momentum need the gradient at every step; choose path='left' and momentum='instant', or refresh=1."
            )
        self.refresh = refresh
        if not band[0] < 1 < band[1]:
            raise InputError(f"InRunShapley(band={band!r}) must hold the share 1: give (lower, upper).")
        self.quadrature = Quadrature(path, tolerance, max_points)
        self.horizon, self.sketch, self.band = horizon, sketch, band

    @property
    def target_names(self) -> list[str]:
        """The targets, in order."""
        return list(self.targets)

    def describe(self) -> Mapping[str, Any]:
        """The settings, for the run's information."""
        settings: dict[str, Any] = {
            "method": "in-run shapley",
            "path": self.path,
            "momentum": self.momentum,
        }
        if self.memory != "keep":
            settings["memory"] = self.memory
        if self.target_gradient != "full":
            settings["target_gradient"] = self.target_gradient
        if self.refresh > 1:
            settings["refresh"] = self.refresh
        if self.granularity != "sample":
            settings["granularity"] = self.granularity
        if self.quadrature.tolerance is not None:
            settings |= {
                "tolerance": self.quadrature.tolerance,
                "max_points": self.quadrature.max_points,
            }
        if self.momentum == "sketch":
            settings["sketch"] = self.sketch
        if self.horizon is not None:
            settings["horizon"] = self.horizon
        return settings

    def attach(self, context: Context) -> InRunSession:
        """Start in a run."""
        return InRunSession(self, context)


def _check_memory(memory: str, path: str, momentum: str, granularity: str) -> None:
    """Refuse what a choice of memory cannot serve."""
    if memory == "keep":
        return
    needs = {"granularity='sample'": granularity == "sample"}
    if memory == "reduced":
        needs["path='trapezoid' or path='simpson'"] = path in ("trapezoid", "simpson")
        needs["momentum='instant' or momentum='sketch'"] = momentum != "exact"
    else:
        needs["momentum='instant'"] = momentum == "instant"
    missing = [need for need, met in needs.items() if not met]
    if missing:
        raise InputError(
            f"InRunShapley(memory={memory!r}) needs {' and '.join(missing)}; choose that, or memory='keep'."
        )


def _choice(name: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise InputError(
            f"InRunShapley({name}={value!r}) is not known; choose one of {', '.join(map(repr, known))}."
        )
    return value
