"""The work of each method, in operations, bytes on disk and bytes of memory."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

from assay.capture.contraction import COST
from assay.plan.shape import Shape

__all__ = ["Training", "Work", "adjoint", "embeddings", "in_run", "index", "training"]

LEDGER_ROW = 12  # bytes of step, micro-batch and id as Parquet keeps them; tests/plan measures it
ROW_IDS = 12  # bytes of id and norm beside a row of projected gradients


@dataclass(frozen=True)
class Training:
    """How much a network is trained.

    Args:
        tokens: of all batches together.
        context: tokens of a row; a row is a sample.
        batch: rows of an optimizer step.
        width: bytes of an activation (2 for bf16).
        states: numbers that the optimizer keeps per parameter (2 for Adam).
    """

    tokens: float
    context: int
    batch: int
    width: int = 2
    states: int = 2

    @property
    def samples(self) -> float:
        """Rows of the whole training."""
        return self.tokens / self.context

    @property
    def steps(self) -> float:
        """Optimizer steps."""
        return self.samples / self.batch


@dataclass(frozen=True)
class Work:
    """What a method adds.

    Args:
        operations: floating-point operations.
        disk: bytes written.
        memory: bytes beyond what training itself takes, over all devices together.
    """

    operations: float
    disk: float = 0.0
    memory: float = 0.0


def training(shape: Shape, run: Training) -> Work:
    """The training itself: a forward pass and a backward pass of twice its work.

    Example:
        >>> from assay.plan.shape import KNOWN
        >>> f"{training(KNOWN['GPT2-small'], Training(1e9, 1024, 512)).operations:.2g}"
        '8.5e+17'
    """
    return Work(3 * shape.forward(run.context) * run.tokens)


def in_run(
    shape: Shape, run: Training, targets: int = 1, rows: float = 1, path: str = "left", rides: bool = True
) -> Work:
    """In-Run Data Shapley (arXiv 2406.11011).

    Args:
        shape: the network.
        run: its training.
        targets: number of targets.
        rows: validation rows of each target.
        path: "left", "trapezoid", "simpson" or "hessian".
        rides: with "left": the inner products are formed inside the backward pass (SGD) and nothing is kept.
    """
    passes = {"left": 1, "trapezoid": 1, "simpson": 2, "hessian": 1}[path]
    validation = 3 * shape.forward(run.context) * run.context * rows * targets * run.steps
    work = passes * validation
    if path == "hessian":
        work += 3 * validation  # forward 1, backward 2, and both products of each matrix's backward twice: 6
    memory = 4.0 * shape.parameters * targets
    if not (path == "left" and rides):
        products, kept = _kept(shape, run)
        work += products * run.tokens * targets
        memory += kept
    return Work(work, run.samples * (LEDGER_ROW + 8 * targets), memory)


def _kept(shape: Shape, run: Training) -> tuple[float, float]:
    """What per-sample gradients cost that wait until they can be valued: operations per token and target, and bytes.

    They are kept whole where they are small, which costs no product; else as the pair that they are the product of.
    """
    operations = held = 0.0
    for d, p, n in shape.matrices:
        whole, pair = d * p, (d + p) * run.context
        if whole <= 4 * pair and run.batch * whole * run.width <= COST.kept_bytes:
            held += n * run.batch * whole * run.width
        else:
            held += n * run.batch * pair * run.width
            operations += n * 2 * d * p
    return operations, held


def embeddings(shape: Shape, run: Training, rank: int = 16, copies: int = 2, width: int = 2) -> Work:
    """Data value embeddings (arXiv 2412.09538): recording in the run, and the backward recursion after it.

    Args:
        shape: the network.
        run: its training.
        rank: of the projection on each side of a matrix.
        copies: rows per sample: 2 for the gradient and its preconditioned form, 1 for SGD.
        width: bytes of a stored number.
    """
    entries = shape.projected(rank)
    project = 2 * sum(n * (d + p) * rank for d, p, n in shape.matrices) * run.tokens * copies
    blocks = sum(n * (min(d, rank) * min(p, rank)) ** 2 for d, p, n in shape.matrices)
    recursion = 4 * blocks * run.samples  # M times a row, and the row's outer product added to M
    disk = run.samples * (entries * width * copies + ROW_IDS)
    return Work(project + recursion, disk, 4 * blocks)


def index(shape: Shape, tokens: float, context: int, rank: int = 64, width: int = 2) -> Work:
    """LoGra's logging pass over a checkpoint (arXiv 2405.13954).

    Args:
        shape: the network.
        tokens: that are logged.
        context: tokens of a row.
        rank: of the projection on each side of a matrix.
        width: bytes of a stored number.
    """
    samples = tokens / context
    entries = shape.projected(rank)
    passes = 3 * shape.forward(context) - 2 * shape.multiplied  # no weight gradients are formed
    project = 2 * sum(n * (d + p) * rank for d, p, n in shape.matrices)
    blocks = sum(n * (min(d, rank) * min(p, rank)) ** 2 for d, p, n in shape.matrices)
    work = (passes + project) * tokens + 2 * blocks * samples  # the last term is the Fisher matrices'
    return Work(work, samples * (entries * width + ROW_IDS) + 4 * blocks, 4 * shape.widest(rank) ** 2)


def adjoint(shape: Shape, run: Training, targets: int = 1) -> Work:
    """The exact answer by replaying the run backwards from up to 2 √steps snapshots.

    Each segment is trained through once more, and each of its steps is gone back through by the Hessian's product
    with the adjoint (forward 1, backward 2, and both products of each matrix's backward twice: 6) and by one more
    product for the values of its samples.

    Args:
        shape: the network.
        run: its training.
        targets: carried back together.
    """
    forward = shape.forward(run.context) * run.tokens
    scores = 2 * shape.multiplied * run.tokens
    vector, distance = 4 * shape.parameters, max(isqrt(int(run.steps)), 1)
    disk = 2 * distance * (1 + run.states) * vector
    kept = distance * (2 + run.states) * vector  # weights, state and gradient of each step of a segment
    borrowed = (2 + 2 * run.states) * vector
    adjoints = targets * (1 + run.states + 4) * vector
    return Work(3 * forward + targets * (9 * forward + scores), disk, kept + borrowed + adjoints)
