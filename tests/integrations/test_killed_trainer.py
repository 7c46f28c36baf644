"""A Trainer that is killed leaves no value without the metadata of its sample."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import assay
from assay.integrations.identity import content_id

pytest.importorskip("transformers")
pytest.importorskip("datasets")


def killed(rows: Any, folder: Path, name: str) -> assay.Ledger:
    (folder / "rows.json").write_text(json.dumps(rows))
    script = Path(__file__).with_name("killed_trainer.py")
    done = subprocess.run([sys.executable, script, folder, name], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    return assay.open(folder / name)


def test_a_killed_trainer_leaves_metadata_for_all_values(rows: Any, tmp_path: Path) -> None:
    ledger = killed(rows, tmp_path, "plain")
    valued = set(ledger.values()["id"])
    assert len(valued) >= 4 * 6  # the last step's effect was not measured yet
    known = dict(ledger.metadata().select("id", "domain").iter_rows())
    assert valued <= set(known)
    assert known.items() <= {row["doc"]: row["domain"] for row in rows}.items()
    assert ledger.by("domain")["domain"].null_count() == 0


def test_a_killed_trainer_leaves_the_documents_of_all_packed_rows(rows: Any, tmp_path: Path) -> None:
    lists = ("input_ids", "labels")
    rows = [row | {key: row[key][:8] for key in lists} for row in rows]  # eight of them fit into the model
    ledger = killed(rows, tmp_path, "packed")
    packed, valued = ledger.table("packed"), set(ledger.values()["id"])
    assert len(valued) >= 6
    assert valued <= set(packed["id"])
    lengths = {row["doc"]: len(row["input_ids"]) for row in rows}
    for (id_,), inside in packed.group_by("id", maintain_order=True):
        assert id_ == content_id(inside["document"].to_list())
        assert inside["tokens"].to_list() == [lengths[name] for name in inside["document"]]
    assert len(list((tmp_path / "packed" / "packed").iterdir())) > 1  # part by part
