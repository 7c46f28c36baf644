"""Is the replay the run? Compared at every step, with a likely cause where it is not."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.errors import InputError
from assay.replay.flat import Flat
from assay.replay.trajectory import StepRecord

__all__ = ["Check", "tolerance_of"]

# of a gradient's norm, at weights that are exactly the run's; rounding grows from step to step
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
GROWN = 50  # times the tolerance, within a segment
MOVED = {torch.float64: 1e-5, torch.float32: 0.2}  # of the distance that the weights moved in a segment


def tolerance_of(dtype: torch.dtype) -> float:
    """What two norms of the same gradient may differ by."""
    return TOLERANCE.get(dtype, 3e-2)


class Check:
    """Compares a replay with what the run logged.

    Args:
        flat: the parameters.
    """

    def __init__(self, flat: Flat) -> None:
        self.flat = flat
        dtype = flat.params[0].dtype
        self.tolerance, self.moved = tolerance_of(dtype), MOVED.get(dtype, 0.5)
        self._first = 0

    def begin(self, step: int) -> None:
        """A segment starts: at this step the weights are exactly the run's."""
        self._first = step

    def ids(self, record: StepRecord, batches: object) -> None:
        """The micro-batches hold the samples that the run saw.

        Raises:
            InputError: they do not; names the first difference.
        """
        try:
            given = [[_plain(i) for i in ids] for ids, _ in batches]  # type: ignore[attr-defined]
        except (TypeError, ValueError) as error:
            raise InputError(
                "batches_of_step(step) must return the step's micro-batches as a list of (ids, batch)."
            ) from error
        if len(given) != len(record.ids):
            raise InputError(
                f"step {record.step}: the run saw {len(record.ids)} micro-batches, batches_of_step gives {len(given)}; "
                "give the same."
            )
        for m, (own, seen) in enumerate(zip(given, record.ids, strict=True)):
            if own != list(seen):
                at = next(
                    (i for i, (a, b) in enumerate(zip(own, seen, strict=False)) if a != b),
                    min(len(own), len(seen)),
                )
                raise InputError(
                    f"step {record.step}, micro-batch {m}: the run saw {_at(seen, at)} in row {at}, batches_of_step "
                    f"gives {_at(own, at)}: the data come in another order; repeat the loader's seed and its shuffling."
                )

    def share(self, record: StepRecord, norm: float, drew: bool) -> float:
        """By which the micro-batches' losses were multiplied: 1, or one over their number.

        Args:
            record: of the step.
            norm: of the replayed gradient, before clipping.
            drew: whether the step drew random numbers.

        Raises:
            InputError: the gradient is neither that of the run nor that divided.
        """
        expected = record.norm / max(record.scales[0], 1e-300)
        ratio = expected / max(norm, 1e-300)
        share = min((1.0, 1 / len(record.ids)), key=lambda share: abs(ratio - share))
        self._compare(record, share * norm, expected, drew)
        return share

    def received(self, record: StepRecord, norm: float, drew: bool) -> None:
        """The gradient that the optimizer is about to receive has the run's norm, after clipping too.

        Raises:
            InputError: it has not; names the step and the likely cause.
        """
        self._compare(record, norm, record.norm, drew)

    def _compare(self, record: StepRecord, found: float, expected: float, drew: bool) -> None:
        allowed = self.tolerance * (1 if record.step == self._first else GROWN)
        if abs(found - expected) <= allowed * max(found, expected):
            return
        if record.step == self._first and not drew:
            cause = (
                "the weights and the ids are the run's, so the data behind the ids, loss_fn or the clipping are not "
                f"(the norms' ratio is {found / max(expected, 1e-300):.6g}); the loss must be the one that was "
                "differentiated, its divisor included, and augmentation must be repeated"
            )
        elif record.step == self._first:
            cause = (
                "the model draws random numbers (dropout), and they came out differently: same device, same version of "
                "torch, and no generator of its own?"
            )
        else:
            cause = (
                "the steps before agreed, so kernels that are not deterministic have driven the two apart "
                "(torch.use_deterministic_algorithms(True) in the run and here), or only this step's data differ"
            )
        raise InputError(
            f"the replay is not the run: at step {record.step} the gradient's norm is {found:.6g}, in the run it was "
            f"{expected:.6g}. Likely cause: {cause}."
        )

    def weights(self, step: int, begin: Tensor, found: Tensor, expected: Tensor) -> None:
        """The segment ends where the run's next snapshot says.

        Raises:
            InputError: it does not.
        """
        moved = float((expected - begin).norm())
        apart = float((found - expected).norm())
        if apart > self.moved * moved + torch.finfo(expected.dtype).eps * float(expected.norm()):
            raise InputError(
                f"the replay is not the run: the weights at step {step} are {apart:.3g} from the snapshot's, which "
                f"moved by {moved:.3g} since step {self._first}. Likely cause: kernels that are not deterministic, or "
                "weights that something else than the optimizer changed (weight averaging, a callback)."
            )


def _plain(value: object) -> object:
    return value.item() if hasattr(value, "item") else value


def _at(ids: object, index: int) -> str:
    rows = list(ids)  # type: ignore[call-overload]
    return repr(rows[index]) if index < len(rows) else "nothing"
