"""Adapters as PEFT makes them, beside a frozen model: the same comparison as for whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")

import assay  # noqa: E402
from conformance.compare import Outcome, compare  # noqa: E402
from conformance.families import build  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT about itself and its neighbours

QV = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, **QV),
    "lora with biases": lambda: peft.LoraConfig(r=4, bias="lora_only", lora_bias=True, **QV),
    "rslora": lambda: peft.LoraConfig(r=4, use_rslora=True, init_lora_weights="gaussian", **QV),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, **QV),
    "lora on the embedding and the head": lambda: peft.LoraConfig(
        r=4, target_modules=["embed_tokens", "lm_head", "q_proj"]
    ),
    "lora beside trained modules": lambda: peft.LoraConfig(r=4, modules_to_save=["lm_head", "norm"], **QV),
    "trained tokens": lambda: peft.LoraConfig(r=4, trainable_token_indices={"embed_tokens": [6, 7, 9]}, **QV),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **QV),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "loha": lambda: peft.LoHaConfig(r=4, **QV),
    "lokr": lambda: peft.LoKrConfig(r=4, **QV),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, **QV),
    "fourier": lambda: peft.FourierFTConfig(n_frequency=10, **QV),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=3, task_type="CAUSAL_LM", encoder_hidden_size=16
    ),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "layer norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "bone": lambda: peft.MissConfig(r=4, **QV),
    "hra": lambda: peft.HRAConfig(r=4, **QV),
}


def adapted(name: str, family: str = "llama") -> tuple[Any, dict[str, Any]]:
    """A frozen model with an adapter whose weights are not zero any more."""
    base, inputs = build(family)
    torch.manual_seed(1)
    model = peft.get_peft_model(base.double(), ADAPTERS[name]()).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    inputs.pop("use_cache", None)
    return model, inputs


def check(outcome: Outcome, tolerance: float) -> None:
    assert outcome.samples < tolerance, f"{outcome.where}: {outcome}"
    assert outcome.total < tolerance, outcome
    assert outcome.deferred < tolerance, outcome
    assert outcome.forms < tolerance, outcome


IN_PART_FLOAT32 = {"fourier", "prefix"}  # their own code casts
BY_FALLBACK = {"prefix": "forward mode"}
REFUSED = {"loha": "exclude="}  # multiplies its factors in an autograd function without second derivative


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name not in REFUSED])
def test_peft(name: str) -> None:
    model, inputs = adapted(name)
    outcome = compare(model, inputs)
    check(outcome, 1e-6 if name in IN_PART_FLOAT32 else 1e-9)
    assert set(outcome.status.values()) <= {"exact", BY_FALLBACK.get(name, "exact")}
    assert len(outcome.status) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    model, inputs = adapted(name)
    with pytest.raises(assay.CoverageError, match=REFUSED[name]):
        compare(model, inputs)
