"""Projected gradients against the dense projection of every sample's own autograd gradient, in float64."""

from __future__ import annotations

import pytest
import torch
from reference import CASES
from reference.cases import Case, Loss
from torch import Tensor, nn
from torch.nn import functional as F

from assay.capture import Weights, bottleneck
from assay.capture.bottleneck import (
    projected,
    projected_through,
    small_projected,
    small_projected_twice,
    small_uses,
    stream_factors,
    written_out,
)
from assay.capture.factors import Dense, Factors, Outer
from assay.capture.marks import Weight
from assay.capture.sides import Sides
from assay.errors import CoverageError, InputError
from assay.projection import Projection, Projector, random_sides, vocabularies

NAMES = [name for name in CASES if not name.endswith("own_loss") and name != "custom_function"]
SMALL = Projection(rank=2, seed=1, support=3)
KINDS = [Projection(rank=3, seed=1), Projection(kind="none"), SMALL]


def watched(model: nn.Module) -> Weights:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return Weights(named, {p: 0 for _, p in named}, model.buffers())


def projector_of(model: nn.Module, projection: Projection) -> Projector:
    weights = watched(model)
    return Projector(weights, {n: random_sides(n, p, projection) for p, n in weights.names.items()})


def dense_projection(gradient: Tensor, sides: Sides) -> Tensor:
    g = gradient.reshape(sides.matrix)
    if sides.entries is not None and sides.signs is not None:
        S_o, S_i = (
            dense_matrix(None, x, n) for x, n in zip((sides.rows, sides.columns), sides.matrix, strict=True)
        )
        matrix = torch.zeros(sides.width, len(S_o) * len(S_i))
        n = sides.entries.shape[2]
        for place, (entries, signs) in enumerate(
            zip(sides.entries.view(-1, n), sides.signs.view(-1, n), strict=True)
        ):
            for entry, sign in zip(entries, signs, strict=True):
                matrix[place, entry] += sign
        P = matrix @ torch.kron(S_o, S_i)
        return P.to(g.dtype) @ g.flatten()
    left, right = (
        dense_matrix(*side, width).to(g.dtype)
        for side, width in zip(
            ((sides.left, sides.rows), (sides.right, sides.columns)), sides.matrix, strict=True
        )
    )
    return (left @ g @ right.t()).flatten()


def dense_matrix(matrix: Tensor | None, read: Tensor | None, width: int) -> Tensor:
    """P, or P = R S with S the rows of the identity that are read."""
    S = torch.eye(width) if read is None else torch.eye(width)[read]
    return S if matrix is None else matrix @ S


def dense_rows(model: nn.Module, terms: list[Tensor], projector: Projector) -> Tensor:
    """One backward pass per sample's own term of the loss."""
    rows = []
    for term in terms:
        params = list(projector.sides)
        gradients = torch.autograd.grad(term, params, allow_unused=True, materialize_grads=True)
        rows.append(
            torch.cat(
                [dense_projection(g, projector.sides[p]) for p, g in zip(params, gradients, strict=True)]
            )
        )
    return torch.stack(rows)


def assert_same(found: Tensor, truth: Tensor, tolerance: float = 1e-10) -> None:
    assert found.shape == truth.shape
    assert truth.abs().max() > 0
    assert (found - truth).abs().max() <= tolerance * truth.abs().max()


def compare(case: Case, loss: Loss, projection: Projection, size: int) -> None:
    model = case.model().eval()
    batch = case.batch(size, seed=3)
    projector = projector_of(model, projection)
    truth = dense_rows(model, [loss.part(model, batch, i) for i in range(size)], projector)
    tolerance = 1e-10 if case.tolerance <= 1e-9 else case.tolerance  # some models cast to float32 themselves
    assert_same(projector.rows(model, loss, batch, size, "sum"), truth, tolerance)


@pytest.mark.parametrize("projection", KINDS, ids=["random", "none", "support"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_dense_projection_of_per_sample_gradients(name: str, projection: Projection) -> None:
    case = CASES[name]
    for loss in case.losses.values():
        compare(case, loss, projection, size=4)


@pytest.mark.parametrize("cached", [1, bottleneck.CACHED], ids=["one at a time", "all at once"])
@pytest.mark.parametrize("projection", KINDS, ids=["random", "none", "support"])
@pytest.mark.parametrize("name", ["mlp", "gpt", "gpt_expanded", "gpt2", "cnn"])
def test_a_diagonal_between_gradient_and_projection(
    name: str, projection: Projection, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bottleneck, "CACHED", cached)
    case = CASES[name]
    model, batch, loss = case.model().eval(), case.batch(4, seed=3), next(iter(case.losses.values()))
    weights = watched(model)
    torch.manual_seed(0)
    through = {p: torch.rand_like(p) for p in weights.params}
    sides = {p: random_sides(n, p, projection) for p, n in weights.names.items()}
    found = {p: torch.zeros(4, *s.ranks, dtype=torch.float64) for p, s in sides.items()}

    def take(weight: Weight, factors: Factors) -> None:
        forms = [factors]
        if isinstance(factors, Outer) and not weight.derived:  # as it is kept where that is smaller
            forms.append(Dense(written_out(weight, factors)[weight.params[0]]))
        parts = [projected_through(weight, form, sides, through) for form in forms]
        for p, part in parts[0].items():
            found[p] += part
            torch.testing.assert_close(parts[-1][p], part)
        for p, small in small_uses(weight, factors, sides).items():  # as it waits for D
            torch.testing.assert_close(small_projected(small, sides[p], through[p]), parts[0][p])
            plain = projected(weight, factors, sides)[p]
            torch.testing.assert_close(small_projected(small, sides[p]), plain)
            twice = small_projected_twice(small, sides[p], sides[p], through[p])
            torch.testing.assert_close(twice, (plain, parts[0][p]))

    stream_factors(model, weights, loss, batch, 4, take)
    for i in range(4):
        gradients = torch.autograd.grad(
            loss.part(model, batch, i), weights.params, allow_unused=True, materialize_grads=True
        )
        for (p, s), g in zip(sides.items(), gradients, strict=True):
            expected = dense_projection(g * through[p], s)
            torch.testing.assert_close(found[p][i].flatten(), expected, rtol=1e-10, atol=1e-12)


def test_a_use_that_no_rule_sees_is_refused_by_name() -> None:
    case = CASES["custom_function"]
    model = case.model()
    projector = projector_of(model, KINDS[0])
    with pytest.raises(CoverageError, match="exclude="):
        projector.rows(model, case.losses["sum"], case.batch(4, seed=3), 4, "sum", check=True)


def test_a_batch_of_one() -> None:
    for name in ("mlp", "gpt2", "cnn"):
        compare(CASES[name], next(iter(CASES[name].losses.values())), KINDS[0], size=1)


def test_a_mean_is_scaled_to_each_example_and_gradients_stay_untouched() -> None:
    case = CASES["mlp"]
    model, batch = case.model(), case.batch(4, seed=3)
    model.train()
    projector = projector_of(model, KINDS[0])
    mean = projector.rows(model, case.losses["sample_mean"], batch, 4, "mean")
    total = projector.rows(model, case.losses["sum"], batch, 4, "sum")
    torch.testing.assert_close(mean, total, rtol=1e-12, atol=0)
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())


class Derived(nn.Module):
    """Weights that are used transposed, cast, shifted, multiplied with one another and drawn through a reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(5, 7))
        self.b = nn.Parameter(torch.randn(6, 5))
        self.c = nn.Parameter(torch.randn(7))
        self.d = nn.Parameter(torch.randn(12, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = x * (1 + self.c)
        y = torch.tanh(x @ self.a.t())
        y = y + x @ (self.b @ self.a).t()[:, :5]
        return F.linear(y, self.d.view(6, 4)[:, :4].repeat(1, 2)[:, :5])


def test_weights_that_are_computed_from_parameters() -> None:
    torch.manual_seed(0)
    model, x = Derived().double(), torch.randn(4, 3, 7).double()

    def loss(model: nn.Module, x: object) -> Tensor:
        return model(x).square().sum()  # type: ignore[no-any-return]

    for projection in KINDS:
        projector = projector_of(model, projection)
        truth = dense_rows(model, [loss(model, x[i : i + 1]) for i in range(4)], projector)
        assert_same(projector.rows(model, loss, x, 4, "sum", check=True), truth)


def test_a_parameter_without_sides_is_left_out() -> None:
    case = CASES["mlp"]
    model, batch, loss = case.model(), case.batch(4, seed=3), case.losses["sum"]
    weights = watched(model)
    some = {n: random_sides(n, p, KINDS[0]) for p, n in weights.names.items() if "bias" not in n}
    whole = projector_of(model, KINDS[0])
    part = Projector(weights, some)
    rows = whole.rows(model, loss, batch, 4, "sum")
    kept = [rows[:, place] for p, place in whole.slices.items() if weights.names[p] in some]
    assert torch.equal(part.rows(model, loss, batch, 4, "sum"), torch.cat(kept, 1))
    assert part.width < whole.width


def test_layers_are_modules_in_order() -> None:
    projector = projector_of(CASES["mlp"].model(), Projection(rank=3))
    assert [layer.name for layer in projector.layers] == ["net.0", "net.2", "net.3"]
    assert [layer.width for layer in projector.layers] == [9 + 3, 3 + 3, 9 + 3]
    assert projector.layers[-1].stop == projector.width


def test_random_matrices_keep_inner_products_on_average_and_depend_on_name_and_seed() -> None:
    param = torch.zeros(400, 300)
    sides = random_sides("w", param, Projection(rank=50))
    assert sides.left is not None
    assert sides.right is not None
    gram = sides.left.t() @ sides.left
    assert abs(float(gram.diagonal().mean()) - 1) < 0.02
    assert abs(float((gram - torch.diag(gram.diagonal())).mean())) < 0.01
    again = random_sides("w", param, Projection(rank=50))
    assert torch.equal(again.left, sides.left)  # type: ignore[arg-type]
    for other in (
        random_sides("v", param, Projection(rank=50)),
        random_sides("w", param, Projection(rank=50, seed=1)),
    ):
        assert not torch.equal(other.left, sides.left)  # type: ignore[arg-type]


@pytest.mark.parametrize("support", [2, 4, 6])
def test_projections_with_a_support_are_unbiased(support: int) -> None:
    """E[PᵀP] = I, entry by entry, where the runs that coordinates are drawn from have unequal lengths as well."""
    param, total, draws = torch.zeros(7, 6), torch.zeros(42, 42), 2000
    for seed in range(draws):
        sides = random_sides("w", param, Projection(rank=2, seed=seed, support=support))
        P = torch.cat([rows.flatten(1) for rows in sides.directions(param)])
        assert P.shape == (4, 42)
        total += P.t() @ P
    assert float((total / draws - torch.eye(42)).abs().max()) < 0.3
    for rows, columns in ((20, 7), (7, 20)):  # a vocabulary, and principal axes without a covariance
        total, kind = torch.zeros(rows * columns, rows * columns), "random" if rows == 20 else "pca"
        for seed in range(draws // 4):
            projection = Projection(rank=6, kind=kind, seed=seed, support=6)  # type: ignore[arg-type]
            sides = random_sides("w", torch.zeros(rows, columns), projection, vocabulary=rows == 20)
            P = torch.cat([row.flatten(1) for row in sides.directions(param)])
            total += P.t() @ P
        assert float((total / (draws // 4)).diagonal().mean() - 1) < 0.02
        assert float(((total / (draws // 4)) - torch.eye(rows * columns)).abs().mean()) < 0.05


def test_vectors_and_rows_of_a_vocabulary_are_read_whole() -> None:
    model = CASES["gpt2"].model()
    whole = vocabularies(model)
    assert {n for n, p in model.named_parameters() if p in whole} == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }
    projection = Projection(rank=2, support=3)
    table = random_sides("wte", torch.zeros(50, 20), projection, vocabulary=True)
    assert table.rows is None
    assert table.ranks == (2, 2)
    assert len(table.columns) == 3  # type: ignore[arg-type]
    assert not random_sides("bias", torch.zeros(50), projection).narrow
    assert not random_sides("small", torch.zeros(3, 3), projection).narrow


def test_refusals_name_what_is_wrong() -> None:
    with pytest.raises(InputError, match="kind='fast'"):
        Projection(kind="fast")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="rank=0"):
        Projection(rank=0)
    with pytest.raises(InputError, match="needs a rank"):
        Projection(rank=None)
    with pytest.raises(InputError, match="support=8"):
        Projection(rank=16, support=8)
    with pytest.raises(InputError, match="leave the support out"):
        Projection(kind="none", support=8)
    case = CASES["mlp"]
    model, batch = case.model(), case.batch(4, seed=3)
    projector = projector_of(model, KINDS[0])
    with pytest.raises(InputError, match="scalar"):
        projector.rows(model, lambda m, b: m(b["x"]), batch, 4, "sum")
    with pytest.raises(InputError, match="3 examples were announced"):
        projector.rows(model, case.losses["sum"], batch, 3, "sum")
    with pytest.raises(InputError, match="does not depend"):
        projector.rows(model, lambda m, b: b["x"].sum(), batch, 4, "sum")
