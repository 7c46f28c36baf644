"""Compiled models stay compiled in a step, and their values are those of the dense reference."""

# mypy: allow-untyped-calls
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from reference import CASES, plan, train, values
from reference.compare import one_target, recorded, relative_error, snapshots_of_plain_training, valuation
from reference.settings import OPTIMIZERS
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint

import assay
from assay.capture import factored
from assay.capture.compiled import parts, slots
from assay.capture.factors import Directional, Outer
from assay.capture.layout import Layout
from assay.errors import AssayWarning

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the compiler itself
    pytest.mark.filterwarnings("error::assay.errors.AssayWarning"),
]
Batch = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No graph of another test, and counters at zero."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def rows(seed: int, count: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


class Blocks(nn.Module):
    """Residual blocks, each under an activation checkpoint of one kind or the other, or under none."""

    def __init__(
        self, reentrant: bool | None = None, dropout: float = 0.0, norm: type[nn.Module] = nn.LayerNorm
    ):
        super().__init__()
        self.checkpoints, self.reentrant = reentrant is not None, reentrant
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        block = [nn.Sequential(nn.Linear(8, 8), norm(8), nn.Tanh(), nn.Dropout(dropout)) for _ in range(2)]
        self.blocks = nn.ModuleList(block)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=self.reentrant) if self.checkpoints else block(x))
        return self.head(x)  # type: ignore[no-any-return]


def entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def trained(
    model: nn.Module,
    *,
    called: Callable[..., Any] | None = None,
    watched: bool = True,
    optimizer: str = "sgd_momentum",
    counts: Sequence[int] = (4, 4),
    loss: Callable[..., Tensor] = entropy,
    check: str = "off",
    **options: Any,
) -> tuple[list[Any], nn.Module]:
    """The values of a short training, and the model; `called` is what the loop calls, if not the model."""
    torch.manual_seed(3)
    opt = OPTIMIZERS[optimizer](model)
    method = assay.InRunShapley({"held_out": assay.Target([rows(9, 3)], loss)}, **options)
    run = assay.Run(model, opt, methods=[method], check=check) if watched else None
    data = [[(list(range(count)), rows(seed, count))] for seed, count in enumerate(counts)]
    train(model if called is None else called, opt, data, loss, record=run.step if run else None)  # type: ignore[arg-type]
    if run is None:
        return [], model
    run.close()
    return recorded(run.ledger), model


def built(seed: int = 0, **options: Any) -> Blocks:
    torch.manual_seed(seed)
    return Blocks(**options).double()


def assert_same(
    found: tuple[list[Any], nn.Module], expected: tuple[list[Any], nn.Module], limit: float = 1e-9
) -> None:
    """The same values, weights and buffers."""
    assert relative_error(found[0], expected[0]) <= limit
    pairs = zip(found[1].state_dict().values(), expected[1].state_dict().values(), strict=True)
    assert all(torch.allclose(a.double(), b.double(), rtol=limit, atol=limit) for a, b in pairs)


# --- exact, and compiled ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("cnn", "sgd_momentum"),  # measured along directions
        ("cnn", "adamw"),  # kept for later
        ("gpt", "sgd_momentum"),
        ("class_token", "adamw"),
        ("llama_tied", "adamw"),
        ("gpt2_own_loss", "sgd_momentum"),
    ],
)
def test_values_are_those_of_the_reference(name: str, optimizer: str) -> None:
    case, build = CASES[name], OPTIMIZERS[optimizer]
    loss = next(iter(case.losses.values()))
    data, targets = plan(case, sizes=(4, 4)), one_target(case, loss, 4)
    snapshots = snapshots_of_plain_training(case, loss, build, data)
    expected = values(snapshots, loss, targets, tolerance=case.tolerance)["held_out"]
    model = torch.compile(case.model(), backend="aot_eager")
    opt = build(model)
    run = assay.Run(model, opt, methods=[valuation(targets)], check="off")
    train(model, opt, data, loss, record=run.step)
    run.close()
    assert relative_error(recorded(run.ledger), expected) <= case.tolerance
    (part,) = run._watcher._compiled._parts.values()
    assert not part.gave_up


def test_no_graph_break_and_no_recompile() -> None:
    """One graph for the steps and one for the target, however many steps there are."""
    model = torch.compile(built(), backend="aot_eager", fullgraph=True)
    trained(model, counts=(4, 4, 4, 4), check="first")
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 3  # the step; the target with and without gradients


@pytest.mark.parametrize("path", ["left", "trapezoid"])
def test_the_targets_pass_runs_compiled_and_nothing_is_compiled_twice(path: str) -> None:
    """With dropout, in evaluation mode, at another number of rows: one graph more, run once per step."""
    ran: list[int] = []

    def counting(graph: torch.fx.GraphModule, examples: Sequence[Tensor]) -> Callable[..., Any]:
        whole = aot_autograd(fw_compiler=lambda g, _: make_boxed_func(g.forward))(graph, examples)

        def run(*inputs: Any) -> Any:
            shapes = {tuple(x.shape) for x in inputs if isinstance(x, Tensor)}
            ran.extend(count for count in (3, 4) if (count, 5) in shapes)
            return whole(*inputs)

        return run

    graphs = []
    for steps in (3, 6):
        torch._dynamo.reset()
        counters.clear()
        ran.clear()
        model = torch.compile(built(dropout=0.3), backend=counting, fullgraph=True, dynamic=False)
        trained(model, counts=(4,) * steps, path=path)
        graphs.append(counters["stats"]["unique_graphs"])
        assert ran.count(4) == steps
        assert ran.count(3) == steps + 1  # rows of the target: at every step's beginning and at the end
    assert graphs[0] == graphs[1]


def test_inductor() -> None:
    """The default compiler, with the same values as without any."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()

    assert_same(trained(torch.compile(net()), optimizer="adamw"), trained(net(), optimizer="adamw"))


@pytest.mark.parametrize(("reentrant", "optimizer"), [(False, "adamw"), (True, "sgd_momentum")])
def test_activation_checkpointing(reentrant: bool, optimizer: str) -> None:
    """Either kind, compiled: the same values, and the activations of the blocks are computed again, not saved."""
    saved: list[int] = []

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        (outputs,) = (node.args[0] for node in graph.graph.nodes if node.op == "output")
        saved.append(len(outputs))
        return make_boxed_func(graph.forward)

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return aot_autograd(
            fw_compiler=compiler,
            bw_compiler=lambda g, _: make_boxed_func(g.forward),
            partition_fn=min_cut_rematerialization_partition,
        )(graph, inputs)

    def compiled(reentrant: bool | None) -> tuple[tuple[list[Any], nn.Module], int]:
        saved.clear()
        model = torch.compile(built(reentrant=reentrant, dropout=0.2), backend=backend, fullgraph=True)
        return trained(model, optimizer=optimizer), max(saved)

    found, fewer = compiled(reentrant)
    assert_same(found, trained(built(dropout=0.2), optimizer=optimizer))
    torch._dynamo.reset()
    assert fewer < compiled(None)[1]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_dropout_draws_the_same_masks_with_assay_and_without(backend: str) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return torch.compile(
            nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.4), nn.Linear(4, 3)).double(), backend=backend
        )

    _, found = trained(net())
    torch._dynamo.reset()
    _, expected = trained(net(), watched=False)
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_statistics_of_batch_normalisation_move_once() -> None:
    found = trained(torch.compile(built(norm=nn.BatchNorm1d), backend="aot_eager"))
    assert_same(found, trained(built(norm=nn.BatchNorm1d)))


@pytest.mark.parametrize("path", ["trapezoid", "hessian"])
def test_paths_that_wait_for_the_step(path: str) -> None:
    found = trained(torch.compile(built(), backend="aot_eager"), path=path)
    assert_same(found, trained(built(), path=path))


@pytest.mark.parametrize("optimizer", ["sgd_momentum", "adamw"])
@pytest.mark.parametrize("form", ["bfloat16", "cpu", "factors"])
def test_forms_of_the_target_gradient(form: str, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are eagerly; the step stays compiled, and gets what is in bfloat16 as it is held."""
    monkeypatch.setattr(factored, "_smaller", lambda *_: True)
    options: dict[str, Any] = {"target_gradient": form, "optimizer": optimizer}
    found = trained(torch.compile(built(), backend="aot_eager"), **options)
    assert_same(found, trained(built(), **options))
    assert counters["stats"]["unique_graphs"] >= 1


@pytest.mark.parametrize("curvature", ["fisher", "ggn"])
def test_embeddings(curvature: Any, tmp_path: Path) -> None:
    """What takes the factors in the backward pass, once or once for every draw, gets those of a compiled model too."""
    found = []
    for compiled in (False, True):
        called, queries = built(), [rows(9, 3)]
        if compiled:
            called.compile(backend="aot_eager")
        opt = OPTIMIZERS["sgd_momentum"](called)
        method = assay.DataValueEmbedding(projection=assay.Projection(rank=4, seed=0), curvature=curvature)
        run = assay.Run(called, opt, out=tmp_path / str(compiled), methods=[method], check="off")
        train(called, opt, [[(list(range(4)), rows(seed))] for seed in (1, 2)], entropy, record=run.step)  # type: ignore[arg-type]
        run.close()
        assert not any(part.gave_up for part in run._watcher._compiled._parts.values())
        embeddings = assay.open(tmp_path / str(compiled)).embeddings(segments=1, curvature=curvature)
        found.append(embeddings.influence(called, queries, entropy))
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3 * float(found[0].abs().max()))


def test_autocast() -> None:
    """The compiled capture casts what the eager one casts."""

    def half(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return entropy(model, batch)

    def model() -> nn.Module:
        return built().float()

    found = trained(torch.compile(_float_input(model()), backend="aot_eager"), loss=half)
    assert_same(found, trained(_float_input(model()), loss=half), limit=1e-2)


def _float_input(model: nn.Module) -> nn.Module:
    model.register_forward_pre_hook(lambda module, args: tuple(x.float() for x in args))
    return model


# --- every way to compile -----------------------------------------------------------------------------------


def test_a_module_compiled_in_place() -> None:
    model = built()
    model.compile(backend="aot_eager", fullgraph=True)
    assert_same(trained(model), trained(built()))
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"]


def test_a_run_that_was_given_the_module_inside_the_compiled_one() -> None:
    model = built()
    found = trained(model, called=torch.compile(model, backend="aot_eager"))
    assert (
        counters["stats"]["unique_graphs"] == 1
    )  # the step; the target runs on the module that the run was given
    assert_same(found, trained(built()))


def test_blocks_compiled_one_by_one_share_their_graph() -> None:
    model = built()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    found = trained(model)
    assert counters["stats"]["unique_graphs"] <= 3
    assert_same(found, trained(built()))


def test_checkpoints_around_compiled_blocks() -> None:
    model = built(reentrant=False)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    assert_same(trained(model), trained(built()))


# --- what falls back, says so once, and stays exact ---------------------------------------------------------


def falls_back(model: nn.Module, expected: nn.Module, reason: str, **options: Any) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", AssayWarning)
        found = trained(model, **options)
    (warning,) = [w for w in seen if issubclass(w.category, AssayWarning)]
    assert "runs eagerly inside run.step" in str(warning.message)
    assert reason in str(warning.message)
    options.pop("called", None)
    assert_same(found, trained(expected, **options))


def test_too_many_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SHAPES", 2)
    model = torch.compile(built(), backend="aot_eager")
    falls_back(model, built(), "more than 2 shapes", counts=(3, 4, 5, 6, 3))


class Broken(Blocks):
    """A model with a graph break of its own."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        torch._dynamo.graph_break()
        return self.head(x)  # type: ignore[no-any-return]


def test_a_graph_break_of_the_model() -> None:
    def broken() -> nn.Module:
        torch.manual_seed(0)
        return Broken().double()

    falls_back(torch.compile(broken(), backend="aot_eager"), broken(), "graph_break")


class Chosen(Blocks):
    """Rows that a mask picks: how many there are is known only when it runs."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        left = x[:, 0] > 0
        y = x.new_zeros(x.shape)
        y[left] = torch.tanh(self.blocks[0][0](x[left]))
        y[~left] = torch.tanh(self.blocks[1][0](x[~left]))
        return self.head(y)  # type: ignore[no-any-return]


def test_rows_that_only_the_data_tell_apart() -> None:
    def chosen() -> nn.Module:
        torch.manual_seed(0)
        return Chosen().double()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        falls_back(torch.compile(chosen(), backend="aot_eager"), chosen(), "")


def test_a_compiled_function_around_the_model() -> None:
    model = built()
    compiled = torch.compile(lambda x: model(x), backend="aot_eager")
    falls_back(model, built(), "compile the model itself", called=compiled)


def test_a_compiler_that_fails() -> None:
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        if any(
            node.op == "call_function" and node.target.__name__ == "followed" for node in graph.graph.nodes
        ):
            calls.append(graph)
            raise ValueError("no room for this graph")
        return graph.forward

    falls_back(torch.compile(built(), backend=backend), built(), "no room for this graph")
    assert len(calls) == 1


# --- the pieces ---------------------------------------------------------------------------------------------


def test_factors_are_taken_apart_and_put_together() -> None:
    x, w, b = torch.randn(4, 3), torch.randn(2, 3), torch.randn(4, 2)

    def moved(weight: Tensor) -> Tensor:
        return x @ weight.t()

    for factors in (Outer(x, b, Layout(0, 4)), Directional(moved, [w], 0, b, Layout(0, 4))):
        tensors, build = slots.taken_apart(factors)
        others = [2 * t for t in tensors]
        G = torch.randn(1, 2, 3)
        torch.testing.assert_close(build(iter(others)).dot(G), 4 * factors.dot(G))
    labelled = Outer(x, b, Layout(0, 2, labels=torch.tensor([0, 1, 1, 0])))
    tensors, build = slots.taken_apart(labelled)
    assert [t.dtype for t in tensors] == [torch.float32, torch.float32, torch.int64]
    form = slots.Form(0, tuple(slots.Slot.of(t) for t in tensors), build)
    carried = [t.to(slot.carrier) for t, slot in zip(tensors, form.slots, strict=True)]
    torch.testing.assert_close(form.factors(carried).dot(G), labelled.dot(G))
