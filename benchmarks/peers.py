"""Other libraries' nearest work as arms of `performance.py`, each where it is installed.

* opacus 1.6, `GradSampleModuleFastGradientClipping`: the norm of every sample's gradient by the ghost norm, in the same
  backward pass; no validation pass, no values.
* dattri-llm 0.1, `DataSelectionCallback`: every sample's inner product with the gradient of a validation batch, taken
  anew inside each step; nothing is dropped.

    pip install --no-deps opacus==1.6.0 opt-einsum dattri-llm==0.1.0

Both follow modules and not operations, so that they count a weight of two modules for the last one's use: the head of
their GPT has a weight of its own.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable

import torch
from overhead import OPTIMIZERS, VOCABULARY, Size, build
from rounds import Step
from torch import Tensor, nn

__all__ = ["LEFT_OUT", "MODULES", "arm", "installed", "left_out"]

MODULES = {"opacus": "opacus", "dattri-llm": "dattri_llm"}
LEFT_OUT = {
    "bergson": "its package asks for torchvision, torchaudio and bitsandbytes, and its callback stores projected "
    "gradients without forming values",
}  # fmt: skip

Loss = Callable[[nn.Module, Tensor], Tensor]
Each = Callable[[], Tensor]


def installed() -> list[str]:
    """The peers that can be measured here."""
    return [name for name, module in MODULES.items() if importlib.util.find_spec(module) is not None]


def left_out() -> dict[str, str]:
    """The others, and why."""
    missing = {name: "not installed" for name in MODULES if name not in installed()}
    return missing | LEFT_OUT


def arm(name: str, size: Size, optimizer: str, device: torch.device) -> Step:
    """One training step of a peer, on a model of its own."""
    model, loss_fn = untied(size)
    model.to(device)
    opt = OPTIMIZERS[optimizer](model)
    generator = torch.Generator().manual_seed(1)
    batch, held_out = (
        torch.randint(VOCABULARY, (n, size.context + 1), generator=generator).to(device)
        for n in (size.batch, 1)
    )
    per_sample = measured(name, model, loss_fn, batch, held_out)

    def step() -> None:
        per_sample()
        opt.step()
        opt.zero_grad()

    return step


def untied(size: Size) -> tuple[nn.Module, Loss]:
    """The GPT of the other arms; the head's weight is a copy of the embedding's."""
    model, loss_fn = build(size, "gpt")
    head: nn.Linear = model.head  # type: ignore[assignment]
    head.weight = nn.Parameter(head.weight.detach().clone())
    return model, loss_fn


def measured(name: str, model: nn.Module, loss_fn: Loss, batch: Tensor, held_out: Tensor) -> Each:
    """A function that runs forward and backward pass, leaves `.grad`, and gives what the peer knows of each sample."""
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # of the embeddings' integers
    return {"opacus": ghost_norms, "dattri-llm": scores}[name](model, loss_fn, batch, held_out)


def ghost_norms(model: nn.Module, loss_fn: Loss, batch: Tensor, held_out: Tensor) -> Each:
    """`[B]`: ‖g_i‖ of the samples' own losses, by opacus."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    for module in list(model.modules()):
        if isinstance(module, nn.Embedding):  # its rule wants indices in one piece of memory
            module.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    wrapped = GradSampleModuleFastGradientClipping(
        model, batch_first=True, loss_reduction="mean", max_grad_norm=1.0, use_ghost_clipping=True
    )

    def run() -> Tensor:
        loss_fn(wrapped, batch).backward()  # type: ignore[no-untyped-call]
        found: Tensor = wrapped.get_norm_sample()
        return found

    return run


def scores(model: nn.Module, loss_fn: Loss, batch: Tensor, held_out: Tensor) -> Each:
    """`[B]`: ⟨g_i, ∇ℓ⟩, by dattri-llm."""
    from dattri_llm import REGISTER_ALL, DataSelectionCallback, HookManager, HookManagerConfig

    found: list[Tensor] = []

    class Scores(DataSelectionCallback):  # type: ignore[misc]
        def select_samples(self, scores: Tensor, *args: object, **kwargs: object) -> object:
            found[:] = [scores]
            return super().select_samples(scores, *args, **kwargs)

    callback = Scores(
        model,
        target="val_loader",
        val_loader=[held_out],
        val_loss_fn=loss_fn,
        selection_kwargs={"threshold": float("-inf")},
    )
    manager = HookManager(model, config=HookManagerConfig(linear_io=REGISTER_ALL), callbacks=[callback])

    def run() -> Tensor:
        with manager.collect():
            loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
        return found[0]

    return run
