"""The work of each method, in operations, bytes on disk and bytes of memory."""

from __future__ import annotations

from dataclasses import dataclass

from assay.capture.contraction import cost_model
from assay.plan.shape import Shape
from assay.replay.graphs import GRAPHS
from assay.snapshots import Snapshots, bytes_of

__all__ = ["Training", "Work", "adjoint", "embeddings", "in_run", "index", "training"]

LEDGER_ROW = 12  # bytes of step, micro-batch and id as Parquet keeps them; tests/plan measures it
# bytes that a gradient with a graph holds, over those of both sides of every matrix; tests/plan measures it
GRAPH = 6
HELD = 4.5  # the same of one that is kept, before it is differentiated: 4 to 5 were found
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
        micro: rows of a micro-batch, whose activations are in memory together.
    """

    tokens: float
    context: int
    batch: int
    width: int = 2
    states: int = 2
    micro: int = 1

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
    shape: Shape,
    run: Training,
    targets: int = 1,
    rows: float = 1,
    path: str = "left",
    rides: bool = True,
    target_gradient: str = "full",
) -> Work:
    """In-Run Data Shapley (arXiv 2406.11011).

    Args:
        shape: the network.
        run: its training.
        targets: number of targets.
        rows: validation rows of each target.
        path: "left", "trapezoid", "simpson" or "hessian".
        rides: with "left": the inner products are formed inside the backward pass (SGD) and nothing is kept.
        target_gradient: how the targets' gradients are held.

    Example:
        >>> from assay.plan.shape import KNOWN
        >>> run = Training(1e9, 8192, 512)
        >>> forms = ("full", "bfloat16", "cpu")
        >>> [in_run(KNOWN["Llama-3-8B"], run, target_gradient=form).memory // 10**9 for form in forms]
        [32.0, 18.0, 4.0]
    """
    passes = {"left": 1, "trapezoid": 1, "simpson": 2, "hessian": 1}[path]
    validation = 3 * shape.forward(run.context) * run.context * rows * targets * run.steps
    work = passes * validation
    if path == "hessian":
        work += 3 * validation  # forward 1, backward 2, and both products of each matrix's backward twice: 6
    alone = path == "left" and rides
    memory = targets * _held(shape, run, rows, path, alone, target_gradient)
    if not alone:
        products, kept = _kept(shape, run)
        work += products * run.tokens * targets
        memory += kept
    return Work(work, run.samples * (LEDGER_ROW + 8 * targets), memory)


def _held(shape: Shape, run: Training, rows: float, path: str, alone: bool, form: str) -> float:
    """Bytes of a target's gradients where they are contracted.

    In full: ∇ℓ; where the optimizer's K is not known before the backward pass K ⊙ ∇ℓ too; along a step the two ends and
    their mean as well. In another form: ∇ℓ at each point, and one parameter written out (two, where one travels).
    """
    if form == "full":
        return 4.0 * shape.parameters * (1 if alone else 2 if path == "left" else 4)
    points = {"left": 1, "hessian": 2, "trapezoid": 2, "simpson": 3}[path]
    largest = 4.0 * max(*(d * p for d, p, _ in shape.matrices), shape.looked_up)
    if form == "cpu":
        return 2 * largest
    if form == "bfloat16":
        return 2.0 * shape.parameters * points + largest
    positions = rows * run.context
    pairs = sum(n * min(4.0 * d * p, run.width * positions * (d + p)) for d, p, n in shape.matrices)
    return (pairs + 4.0 * (shape.looked_up + shape.vectors)) * points + largest


def _kept(shape: Shape, run: Training) -> tuple[float, float]:
    """What per-sample gradients cost that wait until they can be valued: operations per token and target, and bytes.

    They are kept whole where they are small, which costs no product; else as the pair that they are the product of.
    """
    operations = held = 0.0
    for d, p, n in shape.matrices:
        whole, pair = d * p, (d + p) * run.context
        if whole <= 4 * pair and run.batch * whole * run.width <= cost_model("cpu").kept_bytes:
            held += n * run.batch * whole * run.width
        else:
            held += n * run.batch * pair * run.width
            operations += n * 2 * d * p
    return operations, held


def embeddings(
    shape: Shape,
    run: Training,
    rank: int = 16,
    copies: int = 2,
    width: int = 2,
    support: int | None = None,
) -> Work:
    """Data value embeddings (arXiv 2412.09538): recording in the run, and the backward recursion after it.

    Args:
        shape: the network.
        run: its training.
        rank: of the projection on each side of a matrix.
        copies: rows per sample: 2 for the gradient and its preconditioned form, 1 for SGD.
        width: bytes of a stored number.
        support: coordinates of a side that are read; the sub-matrix that they leave is formed once for all copies.
    """
    entries = shape.projected(rank)
    project = 2 * sum(n * (d + p) * rank for d, p, n in shape.matrices) * run.tokens * copies
    if support is not None:
        project = 2 * sum(n * min(d, support) * min(p, support) for d, p, n in shape.matrices) * run.tokens
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


def adjoint(
    shape: Shape,
    run: Training,
    targets: int = 1,
    snapshots: Snapshots | None = None,
    graphs: float = bytes_of(GRAPHS, "graphs"),
) -> Work:
    """The exact answer by replaying the run backwards from its snapshots.

    Each segment is trained through once more. Going back through a step takes a forward pass and the gradient of the
    activations, which all targets share and which is there already where the step's graph was kept, and for each target
    the Hessian's product with its adjoint: each of the three products of a matrix twice. The values of the samples come
    with it.

    Args:
        shape: the network.
        run: its training.
        targets: carried back together.
        snapshots: how they are taken; as many as √steps asks for by default.
        graphs: bytes that graphs may take which are kept from the replay of their step.

    Example:
        >>> from assay.plan.shape import KNOWN
        >>> run = Training(1e9, 1024, 512)
        >>> trained = training(KNOWN["GPT2-small"], run).operations
        >>> [round(adjoint(KNOWN["GPT2-small"], run, n).operations / trained, 1) for n in (1, 8)]
        [3.7, 17.7]
        >>> [round(adjoint(KNOWN["GPT2-small"], run, n, graphs=1e15).operations / trained, 1) for n in (1, 8)]
        [3.0, 17.0]
    """
    vector, steps = 4 * shape.parameters, max(int(run.steps), 1)
    settings = snapshots or Snapshots()
    distance = settings.next_distance(settings.every or 1, steps, (1 + run.states) * vector)
    disk = (steps // distance + 1 + (steps % distance > 0)) * (1 + run.states) * vector
    kept = (
        min(distance, steps) * (2 + run.states) * vector
    )  # weights, state and gradient of each step of a segment
    borrowed = (2 + 2 * run.states) * vector
    adjoints = targets * (1 + run.states + 4) * vector
    sides = sum(n * (d + p) for d, p, n in shape.matrices) * run.context * run.width  # bytes for a row
    held = min(int(graphs / (HELD * sides * run.batch)), distance, steps)  # steps whose graphs are kept
    forward, linear = shape.forward(run.context), 2 * shape.multiplied
    shared = 2 * linear + 3 * (forward - linear)  # in attention both factors are activations
    again = 1 - held / min(distance, steps)
    work = (3 * forward + again * shared + targets * 6 * forward) * run.tokens
    memory = max(GRAPH * run.micro, held * HELD * run.batch) * sides
    return Work(work, disk, kept + borrowed + adjoints + memory)
