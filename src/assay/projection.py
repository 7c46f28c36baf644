"""LoGra: per-sample gradients projected from both sides, layer by layer.

The gradient of a weight is a matrix g_i; what is kept of it is P_o g_i P_iᵀ with P_o `[rank, p]` and P_i `[rank, d]`
(Choe et al., "What is your data worth to GPT?", arXiv 2405.13954, section 3). A side that is no wider than the rank is
kept as it is. Vectors (biases, norms) have one side.

With a support a side is read at that many random coordinates only, and what both sides leave of the gradient is
sketched as one vector (FactGraSS: a random mask on both factors, then a sparse projection; Hu et al., "GraSS: Scalable
Influence Function with Sparse Gradient Compression", arXiv 2505.18976).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import Embedding, Module, Parameter

from assay.capture import Weights
from assay.capture.bottleneck import projected, stream_factors
from assay.capture.factors import Factors
from assay.capture.marks import Weight
from assay.capture.recorder import WHOLE
from assay.capture.sides import Sides, one_of_each_run
from assay.errors import InputError

__all__ = [
    "Layer",
    "Projection",
    "Projector",
    "random_sides",
    "vocabularies",
]

Kind = Literal["random", "pca", "none"]
LossFn = Callable[[Module, object], Tensor]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Projection:
    """How per-sample gradients are made small.

    Args:
        rank: rows of the projection on each side of a weight, so that `rank²` numbers are kept per weight and
            example; None keeps every direction (only with `kind="pca"`, which then turns to the principal axes).
        kind: "random" draws Gaussian matrices with E[PᵀP] = I; "pca" takes the leading eigenvectors of the uncentred
            KFAC covariances of activations and output gradients, which costs one more pass over the examples;
            "none" keeps gradients whole.
        seed: of the random matrices and of the coordinates.
        support: of the wider sides of a matrix only so many coordinates are read, one out of each of as many runs of
            neighbours; E[PᵀP] = I holds as before. That is faster, the more so where an optimizer's diagonal stands
            between gradient and projection. Vectors are read whole, and of a vocabulary (`torch.nn.Embedding`, the head
            of a language model) all rows are. None reads everything.

    Raises:
        InputError: a rank or a support that is no positive number, a support below the rank, or an unknown kind.

    Example:
        >>> Projection(rank=16, support=64)
        Projection(rank=16, kind='random', seed=0, support=64)
    """

    rank: int | None = 64
    kind: Kind = "random"
    seed: int = 0
    support: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(
                f"Projection(kind={self.kind!r}) is not known; choose 'random', 'pca' or 'none'."
            )
        if self.rank is None and self.kind == "random":
            raise InputError("Projection(kind='random') needs a rank; kind='none' keeps gradients whole.")
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):
            raise InputError(f"Projection(rank={self.rank!r}): the rank must be a positive whole number.")
        if self.support is None:
            return
        if self.kind == "none" or self.rank is None:
            raise InputError(
                f"Projection(support={self.support!r}) is read before a projection to some rank; give a rank with "
                "kind='random' or 'pca', or leave the support out."
            )
        if not isinstance(self.support, int) or self.support < self.rank:
            raise InputError(
                f"Projection(support={self.support!r}): a side is read at as many coordinates as its rank, "
                f"{self.rank}, or at more; a good choice is four times the rank."
            )

    @property
    def drawn_again(self) -> bool:
        """Whether the matrices follow from names and seed alone, so that they need not be stored."""
        return self.kind != "pca" and self.support is None


def random_sides(name: str, param: Tensor, projection: Projection, vocabulary: bool = False) -> Sides:
    """The random projection of one parameter: the same on every machine for one name and seed.

    Without a support two Gaussian matrices, N(0, 1/rank). With one, coordinates of both sides, each of which weighs as
    much as the run of neighbours that it was drawn from, and a sketch: the entries that they have in common are dealt
    out to rank² sums with random signs, as evenly as can be. In the place of principal axes two matrices, orthogonal on
    what is read.

    Args:
        name: of the parameter.
        param: itself.
        projection: the settings.
        vocabulary: all its rows are read.
    """
    bare = Sides(tuple(param.shape))
    if projection.kind == "none" or projection.rank is None:
        return bare
    generator = torch.Generator().manual_seed(
        zlib.crc32(name.encode()) ^ (projection.seed * 0x9E3779B1) % 2**63
    )
    rank, support = projection.rank, projection.support
    rows, columns = bare.matrix
    if support is None or param.dim() < 2 or max(rows, columns) <= rank:
        return Sides(bare.shape, _gaussian(rank, rows, generator), _gaussian(rank, columns, generator))
    read_rows, row_weights = _read(rows, None if vocabulary else support, generator)
    read_columns, column_weights = _read(columns, support, generator)
    if projection.kind == "pca":
        left, right = (_orthogonal(rank, weights, generator) for weights in (row_weights, column_weights))
        return Sides(bare.shape, left, right, read_rows, read_columns)
    weights = (row_weights[:, None] * column_weights).flatten()
    entries, signs = _sketch((min(rank, rows), min(rank, columns)), weights, generator)
    return Sides(bare.shape, None, None, read_rows, read_columns, entries, signs)


def _read(width: int, support: int | None, generator: torch.Generator) -> tuple[Tensor | None, Tensor]:
    """The coordinates of a side that are read, None for all, and what they weigh."""
    if support is None or width <= support:
        return None, torch.ones(width)
    return one_of_each_run(width, support, generator)


def _gaussian(rank: int, width: int, generator: torch.Generator) -> Tensor | None:
    """`[rank, width]` with E[PᵀP] = I; None for a side that is no wider than the rank."""
    scale: float = rank**-0.5
    return None if width <= rank else torch.randn(rank, width, generator=generator) * scale


def _orthogonal(rank: int, weights: Tensor, generator: torch.Generator) -> Tensor | None:
    """`[rank, width]` with E[PᵀP] = I on coordinates of these weights; None where all fit into the rank."""
    width = len(weights)
    if width <= rank and bool((weights == 1).all()):
        return None
    axes: Tensor = torch.linalg.qr(torch.randn(width, rank, generator=generator))[0]
    length: float = (width / rank) ** 0.5
    return axes.t() * length * weights


def _sketch(ranks: tuple[int, int], weights: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`[r0, r1, n]` each: every entry in one sum, with a random sign; an entry times 0 where a sum has one less."""
    places = ranks[0] * ranks[1]
    each = -(-len(weights) // places)
    order = torch.randperm(len(weights), generator=generator)
    signs = torch.randint(2, (len(weights),), generator=generator) * 2.0 - 1
    spare = each * places - len(weights)
    entries = torch.cat([order, torch.zeros(spare, dtype=torch.long)]).view(each, *ranks)
    factors = torch.cat([signs * weights[order], torch.zeros(spare)]).view(each, *ranks)
    return entries.movedim(0, 2).contiguous(), factors.movedim(0, 2).contiguous()


def vocabularies(model: Module) -> set[Parameter]:
    """The tables of a model whose rows are tokens (or other things that are looked up), and its head over them."""
    weights: list[Any] = [module.weight for module in model.modules() if isinstance(module, Embedding)]
    head = getattr(model, "get_output_embeddings", None)  # as transformers names it
    weights.append(getattr(head(), "weight", None) if callable(head) else None)
    return {weight for weight in weights if isinstance(weight, Parameter)}


@dataclass(frozen=True)
class Layer:
    """The parameters of one module, and where their entries stand in a row.

    Args:
        name: the module's name in the model; "" for the model's own parameters.
        start: first entry.
        stop: one past the last entry.
        params: names of the parameters, in the order of their entries.
    """

    name: str
    start: int
    stop: int
    params: tuple[str, ...]

    @property
    def width(self) -> int:
        """Number of entries."""
        return self.stop - self.start

    @property
    def columns(self) -> slice:
        """Its entries of a row."""
        return slice(self.start, self.stop)


class Projector:
    """Turns micro-batches into rows of projected per-sample gradients, `[B, width]`.

    A row is the concatenation over parameters of P_o g_i P_iᵀ, row-major, in the order of `sides`.

    Args:
        weights: the watched parameters.
        sides: each parameter's projections, by name.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> weights = Weights(model.named_parameters(), {p: 0 for p in model.parameters()})
        >>> sides = {n: random_sides(n, p, Projection(kind="none")) for n, p in model.named_parameters()}
        >>> projector = Projector(weights, sides)
        >>> x, loss = torch.ones(4, 3), lambda model, x: model(x).sum()
        >>> projector.rows(model, loss, x, 4, "sum").shape
        torch.Size([4, 8])
    """

    def __init__(self, weights: Weights, sides: Mapping[str, Sides]) -> None:
        self.weights = weights
        by_name = {name: param for param, name in weights.names.items()}
        self.sides = {by_name[name]: s.to(by_name[name].device) for name, s in sides.items()}
        self.slices: dict[Parameter, slice] = {}
        start = 0
        for param, s in self.sides.items():
            self.slices[param] = slice(start, start + s.width)
            start += s.width
        self.width = start
        wide = [torch.promote_types(p.dtype, torch.float32) for p in self.sides]
        self.dtype = max(wide, key=lambda dtype: dtype.itemsize)
        self.device = next(iter(self.sides)).device

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The modules that own the parameters, in the order of the row."""
        layers: list[Layer] = []
        for param, place in self.slices.items():
            name = self.weights.names[param]
            module = name.rpartition(".")[0]
            if layers and layers[-1].name == module:
                last = layers.pop()
                layers.append(Layer(module, last.start, place.stop, (*last.params, name)))
            else:
                layers.append(Layer(module, place.start, place.stop, (name,)))
        return tuple(layers)

    def empty(self, batch: int) -> Tensor:
        """`[B, width]` of zeros, to which uses are added."""
        return torch.zeros(batch, self.width, dtype=self.dtype, device=self.device)

    def add(self, rows: Tensor, weight: Weight, factors: Factors, part: slice = WHOLE) -> None:
        """Add the projected gradients of one use by the samples of `part` to `rows` `[B, width]`."""
        for param, found in projected(weight, factors, self.sides).items():
            rows[part, self.slices[param]] += found.flatten(1)

    def rows(
        self,
        model: Module,
        loss_fn: LossFn,
        batch: object,
        size: int,
        reduction: Reduction,
        check: bool = False,
    ) -> Tensor:
        """`[B, width]`: the projected gradients of each example's own loss.

        Args:
            model: the model; its modes, `.grad` and random-number state are left as they are.
            loss_fn: `loss_fn(model, batch)` returns a scalar.
            batch: what it takes.
            size: B, the number of examples, one per row of dimension 0.
            reduction: "mean" if the loss is the mean over examples, "sum" if it is their sum.
            check: compare the capture with plain autograd on this batch first.

        Raises:
            InputError: the loss is no scalar that depends on the watched parameters, or the batch has another size.
            CoverageError: a parameter is used in a way that has no exact rule.
        """
        rows = self.empty(size)
        stream_factors(
            model, self.weights, loss_fn, batch, size, lambda w, f: self.add(rows, w, f), check=check
        )
        return rows.mul_(size) if reduction == "mean" else rows
