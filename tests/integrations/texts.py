"""The data collator of the tests."""

from __future__ import annotations

from typing import Any

import torch


def pad(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate to the longest row; only the columns of the model may arrive."""
    assert not {"doc", "domain"} & set(examples[0])
    longest = max(len(example["input_ids"]) for example in examples)

    def padded(values: list[int], fill: int) -> list[int]:
        return [*values, *[fill] * (longest - len(values))]

    return {
        "input_ids": torch.tensor([padded(example["input_ids"], 0) for example in examples]),
        "attention_mask": torch.tensor([padded([1] * len(example["input_ids"]), 0) for example in examples]),
        "labels": torch.tensor([padded(example["labels"], -100) for example in examples]),
    }
