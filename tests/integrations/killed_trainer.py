"""Trainings with the callback that die by SIGKILL: `python killed_trainer.py FOLDER NAME`.

FOLDER/rows.json holds the documents. No checkpoint is saved and nothing is closed; a run is left in FOLDER/NAME, whose
name says what its rows are: "plain" or "packed".
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import torch
import transformers

from assay.integrations.transformers import AssayCallback
from integrations.texts import pad
from integrations.two_processes import make_model

STEPS = 7


def flattened(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """All examples in one row, as collators without padding make it."""
    tokens = [token for example in examples for token in example["input_ids"]]
    return {"input_ids": torch.tensor([tokens]), "labels": torch.tensor([tokens])}


class Kill(transformers.TrainerCallback):  # type: ignore[misc]
    """After a number of steps the machine is taken away."""

    def __init__(self, callback: AssayCallback) -> None:
        self.callback = callback

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.callback.run is not None
        self.callback.run.writer._flush_seconds = 0.0  # as if every step took half a minute

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == STEPS:
            assert self.callback.run is not None
            self.callback.run.status()  # what is booked goes to the writer, as every 64 steps
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, name: str, collate: Any) -> None:
    rows = json.loads((folder / "rows.json").read_text())
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=4, num_train_epochs=1, logging_steps=3,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        make_model(), arguments, data_collator=collate, train_dataset=datasets.Dataset.from_list(rows[:40]),
        eval_dataset=datasets.Dataset.from_list(rows[40:]),
    )  # fmt: skip
    callback = AssayCallback(out=folder / name, id="doc", columns=["domain"], group="domain").attach(trainer)
    trainer.add_callback(Kill(callback))
    trainer.train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    where, which = Path(sys.argv[1]), sys.argv[2]
    train(where, which, {"plain": pad, "packed": flattened}[which])
