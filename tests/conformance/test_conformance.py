"""The conformance table: each architecture, fast path or named fallback, against autograd on single samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Module

from conformance.compare import Outcome, compare
from conformance.families import build
from conformance.plain import PLAIN

EXACT = {"exact", "forward mode", "sample loop"}

# families whose models compute in float64 from end to end
IN_FLOAT64 = [
    "albert", "arcee", "bart", "bert", "biogpt", "bit", "blenderbot", "bloom", "camembert", "codegen",
    "convnext", "convnextv2", "data2vec-text", "deberta", "deberta-v2", "deit", "dinov2", "distilbert",
    "electra", "falcon", "fnet", "glm", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "hubert",
    "llama", "m2m_100", "marian", "mbart", "mistral", "mixtral", "modernbert", "mpnet", "mpt", "mt5",
    "olmo", "olmo2", "opt", "pegasus", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "regnet", "resnet", "roberta", "roformer", "rwkv", "segformer", "siglip_vision_model",
    "squeezebert", "stablelm", "starcoder2", "swin", "swinv2", "t5", "vit", "wav2vec2", "whisper",
    "xlm-roberta", "xlnet", "clip",
]  # fmt: skip
# families whose code casts to float32 inside (norms, routers, scans): that rounding is all that is left
IN_PART_FLOAT32 = [
    "cohere", "deepseek_v3", "falcon_mamba", "gemma", "gemma2", "gemma3_text", "helium", "jamba", "mamba",
    "switch_transformers",
]  # fmt: skip


def doubled(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
    }


def check(outcome: Outcome, tolerance: float) -> None:
    assert outcome.samples < tolerance, f"{outcome.where}: {outcome}"
    assert outcome.total < tolerance, outcome
    assert outcome.deferred < tolerance, outcome
    assert outcome.forms < tolerance, outcome


def covered(model: Module, outcome: Outcome) -> None:
    """Every trainable parameter that an output depends on has a status that means exact."""
    missing = {name for name, status in outcome.status.items() if status not in EXACT}
    grads = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert not missing & grads
    assert len(outcome.status) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", IN_FLOAT64 + IN_PART_FLOAT32)
def test_transformers(family: str) -> None:
    model, inputs = build(family)
    model = model.double()
    outcome = compare(model, doubled(inputs))
    check(outcome, 1e-9 if family in IN_FLOAT64 else 1e-6)
    covered(model, outcome)


@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_in_one_product(family: str, experts: str) -> None:
    """The grouped kernel exists in float32 only."""
    model, inputs = build(family, experts)
    outcome = compare(model, inputs)
    check(outcome, 1e-4)
    covered(model, outcome)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_torch(name: str, strict: bool) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model, inputs = PLAIN[name]()
        outcome = compare(model.double(), doubled(inputs), strict=strict)
    finally:
        torch.set_default_dtype(torch.float32)
    check(outcome, 1e-9)
    covered(model, outcome)
    assert set(outcome.status.values()) <= {"exact", "unused"}
