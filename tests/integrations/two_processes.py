"""A Trainer in two processes with the callback: `torchrun --nproc-per-node 2 two_processes.py FOLDER`.

FOLDER/rows.json holds the documents; a run is left in FOLDER/ACCUMULATE for every number of micro-batches.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import torch
import transformers

import assay
from assay.integrations.transformers import AssayCallback
from integrations.texts import pad

ACCUMULATE = (1, 2)
STOP = 3  # the training with two micro-batches is broken off here, and resumed


def make_model() -> Any:
    transformers.set_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


class Stop(transformers.TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == STOP


def train(folder: Path, accumulate: int, batch: int, **more: Any) -> None:
    """One epoch over the documents, `batch` of them at a time in each process."""
    rows = json.loads((folder / "rows.json").read_text())
    stop = more.pop("stop", False)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / f"trainer-{accumulate}-{batch}"), per_device_train_batch_size=batch, num_train_epochs=1,
        learning_rate=3e-3, weight_decay=0.1, max_grad_norm=0.5, adam_epsilon=1e-5, warmup_steps=2, logging_steps=2,
        report_to=[], save_strategy="steps", save_steps=2, use_cpu=True, disable_tqdm=True,
        gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    trainer = transformers.Trainer(
        make_model(), arguments, data_collator=pad, train_dataset=datasets.Dataset.from_list(rows[:32]),
        eval_dataset=datasets.Dataset.from_list(rows[40:]),
    )  # fmt: skip
    if stop:
        trainer.add_callback(Stop())
    callback = AssayCallback(
        out=folder / f"{accumulate}-{batch}", id="doc", columns=["domain"], group="domain"
    )
    callback.attach(trainer)
    trainer.train(**more)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error", assay.AssayWarning)
    warnings.filterwarnings("ignore", ".*explain", assay.AssayWarning)
    where = Path(sys.argv[1])
    train(where, 1, 2)
    train(where, 2, 2, stop=True)
    train(where, 2, 2, resume_from_checkpoint=True)
