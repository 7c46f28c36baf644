"""The matrices of a network, as one token meets them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import Embedding, Linear, Module

from assay.errors import InputError

__all__ = ["KNOWN", "Shape", "shape_of"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer.

    Args:
        matrices: `(d, p, how many)`: inputs, outputs and number of the matrices that every token is multiplied with.
        attention: `(layers, heads × head size)`.
        looked_up: entries of embedding tables that are looked up and are no matrix above.
        vectors: entries of biases and norms.

    Example:
        >>> KNOWN["GPT2-small"].parameters
        124439808
    """

    matrices: tuple[tuple[int, int, int], ...]
    attention: tuple[int, int]
    looked_up: int = 0
    vectors: int = 0

    @property
    def multiplied(self) -> int:
        """Entries of the matrices that a token is multiplied with."""
        return sum(d * p * n for d, p, n in self.matrices)

    @property
    def parameters(self) -> int:
        """All entries."""
        return self.multiplied + self.looked_up + self.vectors

    def forward(self, context: int) -> int:
        """Operations of a forward pass for one token of a row of `context` tokens."""
        layers, width = self.attention
        return 2 * self.multiplied + 4 * layers * width * context

    def projected(self, rank: int) -> int:
        """Entries of a sample's gradient after LoGra's projection of every matrix from both sides."""
        return sum(min(d, rank) * min(p, rank) * n for d, p, n in self.matrices)

    def widest(self, rank: int) -> int:
        """Entries of the largest layer's projected gradient."""
        return max(min(d, rank) * min(p, rank) for d, p, _ in self.matrices)


def shape_of(model: Module, attention: tuple[int, int] = (0, 0)) -> Shape:
    """The sizes of a model that is made of linear layers and embeddings.

    A weight that is shared by an embedding and a linear layer is a matrix, once.

    Args:
        model: the model; nothing is run.
        attention: `(layers, heads × head size)`, which modules do not tell.

    Raises:
        InputError: it has no linear layer.

    Example:
        >>> import torch
        >>> shape_of(torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 3))).multiplied
        12
    """
    matrices: dict[int, tuple[int, int]] = {}
    tables: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, Linear):
            p, d = module.weight.shape
            matrices[id(module.weight)] = (d, p)
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' transposed linear
            weight: Tensor = module.weight  # type: ignore[assignment]
            matrices[id(weight)] = (weight.shape[0], weight.shape[1])
        elif isinstance(module, Embedding):
            tables[id(module.weight)] = module.weight.numel()
    if not matrices:
        raise InputError(
            f"{type(model).__name__} has no linear layer: its cost cannot be planned; measure a short run instead."
        )
    counted = {sizes: list(matrices.values()).count(sizes) for sizes in matrices.values()}
    looked_up = sum(entries for key, entries in tables.items() if key not in matrices)
    whole = sum(p.numel() for p in model.parameters())
    known = tuple((d, p, n) for (d, p), n in counted.items())
    return Shape(known, attention, looked_up, whole - sum(d * p * n for d, p, n in known) - looked_up)


def _gpt(layers: int, width: int, vocabulary: int, context: int, tied: bool) -> Shape:
    """GPT-2's kind of block (Pythia has the same matrices, and rotary positions instead of a table)."""
    matrices = (
        (width, 3 * width, layers),
        (width, width, layers),
        (width, 4 * width, layers),
        (4 * width, width, layers),
        (width, vocabulary, 1),
    )
    vectors = layers * (3 + 1 + 4 + 1 + 4) * width + 2 * width
    looked_up = context * width + (0 if tied else vocabulary * width)
    return Shape(matrices, (layers, width), looked_up, vectors)


def _llama(layers: int, width: int, inner: int, keys: int, vocabulary: int) -> Shape:
    matrices = (
        (width, width, 2 * layers),
        (width, keys, 2 * layers),
        (width, inner, 2 * layers),
        (inner, width, layers),
        (width, vocabulary, 1),
    )
    return Shape(matrices, (layers, width), vocabulary * width, (2 * layers + 1) * width)


KNOWN = {
    "GPT2-small": _gpt(12, 768, 50257, 1024, tied=True),
    "Pythia-410M": _gpt(24, 1024, 50304, 0, tied=False),
    "Llama-3-8B": _llama(32, 4096, 14336, 1024, 128256),
    "Llama-3-70B": _llama(80, 8192, 28672, 1024, 128256),
}
