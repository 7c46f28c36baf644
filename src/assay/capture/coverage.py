"""Which operations used each parameter, and by which rule its per-sample gradients were formed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import polars as pl
from torch import Tensor
from torch.nn import Parameter

from assay.errors import CoverageError

__all__ = ["Coverage"]


@dataclass
class Coverage:
    """Collects the uses of parameters, by parameter.

    Args:
        names: every parameter that is watched, with its name.
        left_out: the other parameters of the model, name → (entries, why).
    """

    names: Mapping[Parameter, str]
    left_out: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    uses: dict[Parameter, dict[str, int]] = field(default_factory=dict)
    fallbacks: dict[Parameter, str] = field(default_factory=dict)

    def note(self, params: Iterable[Parameter], operation: str, rule: str, y: Tensor) -> None:
        """Enter one use."""
        how = operation if rule == operation else f"{operation} ({rule})"
        for param in params:
            counts = self.uses.setdefault(param, {})
            counts[how] = counts.get(how, 0) + 1

    def fall_back(self, params: Iterable[Parameter], fallback: str, cost: str) -> None:
        """Enter parameters that a fallback measures."""
        for param in params:
            self.fallbacks[param] = fallback
            self.uses[param] = {cost: 1}

    def _status(self, param: Parameter) -> str:
        if param in self.uses:
            return self.fallbacks.get(param, "exact")
        return "unused" if self.uses else "not measured"

    def check_all_seen(self) -> None:
        """Every parameter that has a gradient has been seen in use.

        Raises:
            CoverageError: names those that have not.
        """
        unseen = [
            name for param, name in self.names.items() if param not in self.uses and param.grad is not None
        ]
        if unseen:
            raise CoverageError(
                f"parameter {', '.join(unseen)} got a gradient, but the capture saw no sample use it: is it used "
                "inside a custom autograd.Function, or in a term of the loss that is no sample's? Use a plain torch "
                f"operation inside run.step, or pass exclude={unseen} (scores are then partial)."
            )

    def frame(self) -> pl.DataFrame:
        """One row per parameter: `parameter, entries, percent, status, operations`.

        `status` is "exact", "forward mode" or "sample loop" (exact by these fallbacks, with their cost under
        `operations`), "unused" (no sample used it so far), "not measured" (the capture has seen no use of
        any), "excluded", "frozen", "not optimized" or "trained later".
        """
        rows = [
            (name, param.numel(), self._status(param), ", ".join(self.uses.get(param, {})))
            for param, name in self.names.items()
        ]
        rows += [(name, entries, why, "") for name, (entries, why) in self.left_out.items()]
        total = max(sum(entries for _, entries, _, _ in rows), 1)
        return pl.DataFrame(
            [(n, e, 100 * e / total, s, o) for n, e, s, o in rows],
            schema={
                "parameter": pl.String,
                "entries": pl.Int64,
                "percent": pl.Float64,
                "status": pl.String,
                "operations": pl.String,
            },
            orient="row",
        )
