"""Every refusal of the capture: provoked, and its message names what is meant and says what to do.

The last test reads the source: a `raise` without an entry in the table fails it.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture.test_fallback import Cube
from capture.test_fallback import train as trained_turned
from capture.test_refusals import Doubling, Mixing, patched
from torch import Tensor, nn

import assay
import assay.capture
from assay.capture import Capture, Weights
from assay.capture.bottleneck import _project, refuse_uncovered, stream_factors, written_out
from assay.capture.factors import Dense, Directional, Lookup
from assay.capture.gradients import squared_norms
from assay.capture.layout import Layout
from assay.capture.marks import Weight, leaf
from assay.capture.sides import Sides

ROWS = 4
Loss = Callable[[Any, Tensor], Tensor]


def squares(model: Any, x: Tensor) -> Tensor:
    return model(x).square().mean()  # type: ignore[no-any-return]


class Written(nn.Module):
    """A model of one weight, `[5, 3]`, and a body given as a function."""

    def __init__(self, body: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(5, 3))
        self.body = body
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def step(
    model: nn.Module,
    loss: Loss = squares,
    x: Tensor | None = None,
    check: str = "off",
    exclude: Any = (),
    **options: Any,
) -> None:
    """One step of a run, in float64."""
    model = model.double()
    x = torch.randn(ROWS, 5).double() if x is None else x
    kind = torch.optim.AdamW if options else torch.optim.SGD  # values wait for the step
    target = assay.Target([x], loss)
    methods = [assay.InRunShapley({"t": target}, **options)]
    optim = kind(model.parameters(), lr=0.1)
    with assay.Run(model, optim, methods=methods, check=check, exclude=exclude) as run:
        with run.step(range(len(x))):
            loss(model, x).backward()
        optim.step()


def returning(change: Callable[[Any, Tensor], Any], loss: Loss, **options: Any) -> Callable[[], None]:
    """A model that needs a fallback for `inner`, with something done to what it returns."""

    def body(m: Any, x: Tensor) -> Any:
        h = torch.tanh(m.inner(torch.rot90(torch.rot90(x, 1), -1)))
        return change(m, Cube.apply(h) if options.get("cube") else h)

    return lambda: step(Written(body, inner=nn.Linear(5, 3)), loss, check="first", exclude=["w"])


class Unknown:
    """A container that nobody has told pytree about."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def changing(m: Any, h: Tensor) -> Tensor:
    """Another function in every training pass."""
    m.calls = getattr(m, "calls", 0) + m.training
    return h * (1 + m.calls)


class OwnLoss(nn.Module):
    """Uses its weight once where it is seen and once where it is not, and returns nothing per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) + Doubling.apply(x, self.inner.weight)).square().mean()


def streamed(loss: Callable[[Any, Any], Any], size: int = ROWS) -> None:
    model = nn.Linear(5, 3)
    weights = Weights(model.named_parameters(), dict.fromkeys(model.parameters(), 0))
    stream_factors(model, weights, loss, torch.randn(ROWS, 5), size, lambda weight, factors: None)


def fused_dropout() -> None:
    with torch.device("meta"):
        lstm, x = nn.LSTM(5, 6, 2, dropout=0.5, batch_first=True), torch.randn(ROWS, 7, 5)
    with Capture(Weights(lstm.named_parameters(), dict.fromkeys(lstm.parameters(), 0)), ROWS):
        lstm(x)


def uncovered() -> None:
    model = nn.Linear(5, 3)
    weights = Weights(model.named_parameters(), dict.fromkeys(model.parameters(), 0))
    weights.hand_over({model.weight: "no rule"}, "forward mode")
    refuse_uncovered(weights)


class Products:
    """Factors that answer inner products only."""

    def dot(self, directions: Tensor) -> Tensor:
        return torch.zeros(len(directions), ROWS)


PARAM = nn.Parameter(torch.zeros(5, 3))
ONLY_PRODUCTS = Weight((PARAM,), lambda directions: {0: directions[PARAM]})
IDS = torch.randint(0, 5, (ROWS, 6))
OFFSETS = torch.arange(ROWS) * 6


def turned() -> None:
    step(Written(lambda m, x: torch.rot90(torch.rot90(x, 1), -1) @ m.w))


def bag(m: Any, ids: Tensor) -> Tensor:
    return F.embedding_bag(ids.flatten(), m.w, OFFSETS, mode="max")


def passes(*work: Callable[[nn.Module, Tensor], object], **options: Any) -> Callable[[], None]:
    """A step in which these run one after the other, each with the loss."""

    def provoke() -> None:
        model = Written(lambda m, x: m.head(x @ m.w), head=nn.Linear(3, 2)).double()
        x = torch.randn(ROWS, 5).double()
        methods = [assay.InRunShapley(assay.Target([x], squares), **options)]
        optim = torch.optim.AdamW(model.parameters(), lr=0.1)
        with assay.Run(model, optim, methods=methods) as run, run.step(range(ROWS)):
            for part in work:
                part(model, squares(model, x))

    return provoke


def backward(_: nn.Module, loss: Tensor) -> None:
    loss.backward()


def penalised(model: Any, loss: Tensor) -> None:
    (g,) = torch.autograd.grad(loss, model.w, create_graph=True)
    (loss + g.square().sum()).backward()


def half_of_a_product() -> None:
    model = Written(lambda m, x: x @ (m.w @ m.head.weight.t()), head=nn.Linear(3, 2, bias=False)).double()
    x = torch.randn(ROWS, 5).double()
    optim = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        assay.Run(model, optim, methods=[assay.InRunShapley(assay.Target([x], squares))]) as run,
        run.step(range(ROWS)),
    ):
        squares(model, x).backward(inputs=[model.w])


# part of the message → what draws it, and a name of a parameter or an operation that it must hold
REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "got a gradient, but the capture saw no sample use it": (lambda: step(patched()), r"2\.weight"),
    "meets the samples in": (turned, "w.*`matmul`"),
    "its output does not keep the samples apart": (turned, "w.*`matmul`"),
    "it returns several tensors": (
        lambda: step(Written(lambda m, x: torch.linalg.lstsq(m.w, x.t()).solution.t())), "w.*`linalg_lstsq`",
    ),
    "this form of it is not known": (
        lambda: step(Written(bag), lambda m, ids: m(ids).square().mean(), IDS), "w.*`embedding_bag`",
    ),
    "the start-up check finds no exact per-sample gradients": (lambda: step(Mixing(), check="first"), r"first\.weight"),
    "do not add up to .grad: a use of it was not seen": (
        lambda: step(OwnLoss(), lambda m, x: m(x), check="first"), r"inner\.weight",
    ),
    "have a use that no rule follows": (lambda: trained_turned(norm=True), r"second\.weight"),
    "mixes the samples in training mode": (lambda: trained_turned(norm=True), "'norm'"),
    "in which no tensor with a gradient was found": (
        returning(lambda m, h: Unknown(h), lambda m, x: m(x).logits.square().mean()), r"inner\.weight.*Unknown",
    ),
    "computes a scalar from it that does not come from outputs": (
        returning(lambda m, h: (h, h.sum() + m.inner.weight.square().sum()), lambda m, x: sum(y.mean() for y in m(x))),
        r"inner\.weight",
    ),
    "gives other outputs when it is repeated": (returning(changing, squares), r"inner\.weight"),
    "which the loss uses, has no row per sample": (
        returning(lambda m, h: (h, h.square().sum(0)), lambda m, x: m(x)[1].mean()), r"inner\.weight.*output 1",
    ),
    "draws random numbers": (lambda: trained_turned(cube=True, dropout=0.4), r"second\.weight"),
    "gives outputs of other shapes than in the batch": (
        returning(lambda m, h: (h, h @ h.t()), lambda m, x: m(x)[1].mean(), cube=True), r"inner\.weight",
    ),
    "was not called, or nothing came back": (
        returning(lambda m, h: h, lambda m, x: (m(x), torch.tanh(m.inner(x)).mean())[1]), r"inner\.weight",
    ),
    "rows that belong to no sample": (
        lambda: Layout(0, 2).labelled(0, torch.tensor([0, 1, -1])).per_sample_sum(torch.ones(3, 1)), "padding",
    ),
    "neither a forward-mode nor a second derivative": (
        lambda: Directional(
            torch.cdist, [torch.zeros(ROWS, 3), PARAM.detach()], 1, torch.ones(ROWS, 5), Layout(0, ROWS), of="w"
        ).dot(torch.ones(1, 5, 3)), "^w: .*_cdist_backward",
    ),
    "draws its dropout inside the kernel": (fused_dropout, "weight_ih_l0.*lstm"),
    "has max_norm=": (
        lambda: step(Written(lambda m, ids: m.table(ids), table=nn.Embedding(5, 3, max_norm=1.0)), x=IDS),
        r"table\.weight",
    ),
    "uses sparse gradients or scale_grad_by_freq": (
        lambda: step(Written(lambda m, ids: m.table(ids), table=nn.Embedding(5, 3, scale_grad_by_freq=True)), x=IDS),
        r"table\.weight",
    ),
    "examples were announced": (lambda: streamed(squares, size=3), "3 examples.*4"),
    "must return a scalar tensor": (lambda: streamed(lambda m, x: m(x)), "loss_fn"),
    "the loss does not depend on the parameters": (lambda: streamed(lambda m, x: x.sum()), "parameters"),
    "has no per-sample gradients that can be projected": (uncovered, "weight"),
    "cannot be written out": (lambda: written_out(ONLY_PRODUCTS, Products()), "inner products"),
    "cannot be projected": (lambda: _project(Products(), Sides((5, 3))), "inner products"),
    "that its gradients have no norm": (
        lambda: squared_norms([(ONLY_PRODUCTS, Products())], {PARAM: "inner.weight"}, ROWS), r"inner\.weight",
    ),
    "of its parameters lie outside of that": (
        lambda: step(
            nn.Sequential(nn.Linear(5, 3)), lambda m, x: m(x).square().mean() + m[0](x).mean(), memory="recompute"
        ),
        "memory='recompute'",
    ),
    "gives other outputs when it is taken again": (
        lambda: step(Written(lambda m, x: changing(m, x @ m.w)), memory="recompute"), "memory='recompute'",
    ),
    "the gradients were changed between two backward passes": (
        passes(backward, lambda m, _: m.get_parameter("w").grad.mul_(0.5), backward), "run.step",  # type: ignore[union-attr]
    ),
    "some gradients were zeroed and others were not": (
        passes(backward, lambda m, _: m.get_submodule("head").zero_grad(), backward), "run.step",
    ),
    "inside run.step leaves out": (
        passes(lambda m, loss: loss.backward(inputs=[m.get_parameter("w")]), memory="recompute"), r"head\.weight",
    ),
    "inside run.step the loss contains a gradient of the loss": (passes(penalised), "create_graph=True"),
    "of which one weight is computed": (half_of_a_product, r"w, head\.weight"),
}  # fmt: skip
ADVICE = re.compile(
    r"exclude=|[Pp]ass |[Uu]se |drop |choose |remove |give |return |leave |rewrite |move |remove "
)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("fragment", REFUSALS)
def test_the_message_names_what_is_meant_and_says_what_to_do(fragment: str) -> None:
    provoke, named = REFUSALS[fragment]
    torch.manual_seed(0)
    with pytest.raises((assay.CoverageError, assay.InputError)) as error:
        provoke()
    message = str(error.value)
    assert fragment in message
    assert re.search(named, message), message
    assert ADVICE.search(message), message
    assert "\n" not in message


def sites() -> Iterator[tuple[str, str]]:
    """Where the capture refuses, and the words that are always in the message."""
    folder = Path(assay.capture.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = ast.unparse(node.func)
            if name in ("CoverageError", "InputError", "self._error") or name.endswith(".refuse"):
                texts = [
                    n.value
                    for n in ast.walk(node)
                    if isinstance(n, ast.Constant) and isinstance(n.value, str)
                ]
                if texts:
                    yield f"{path.relative_to(folder)}:{node.lineno}", "\0".join(texts)


def test_every_refusal_is_in_the_table() -> None:
    found = list(sites())
    assert len(found) > 20
    missing = [where for where, text in found if not any(fragment in text for fragment in REFUSALS)]
    assert not missing, f"refusals without an entry in the table above: {missing}"


def test_every_entry_of_the_table_is_in_the_source() -> None:
    texts = [text for _, text in sites()]
    assert not [fragment for fragment in REFUSALS if not any(fragment in text for text in texts)]


def test_factors_that_can_be_written_out_are() -> None:
    """What the refusals above turn away is an exception."""
    g = torch.randn(ROWS, 5, 3)
    assert written_out(leaf(PARAM, 0), Dense(g))[PARAM] is g
    rows = Lookup(torch.tensor([[0], [1], [2], [0]]), torch.ones(ROWS, 1, 3), Layout(0, ROWS))
    assert squared_norms([(leaf(PARAM, 0), rows)], {PARAM: "w"}, ROWS)[PARAM].tolist() == [3.0] * ROWS
