"""Readers of what others may have written: whatever comes, an answer or one of assay's own errors, in one line."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from index import killed

from assay.doctor import examine
from assay.errors import AssayError, AssayWarning
from assay.index import Index
from assay.rows import Folder, RowReader
from assay.rows.folder import _checksum
from assay.store import RunWriter, open_ledger
from assay.store.header import checksum
from assay.train import load_config

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS, lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=6), c, max_size=3)
)
PATIENT = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def answers(call: Callable[[], object]) -> None:
    """It answers, or raises one of assay's errors, in one line."""
    said = "an answer"
    try:
        call()
    except AssayError as error:
        said = str(error)
    assert said
    assert "\n" not in said


KEYS = st.sampled_from(
    ["out", "seed", "device", "data", "data.path", "model", "model.name", "model.width", "targets", "targets.by",
     "targets.values", "targets.files", "train", "train.betas", "train.steps", "train.clip", "attribution",
     "attribution.path", "attribution.tolerance", "", ".", "data.", "train.betas.0"]
)  # fmt: skip


@PATIENT
@given(text=st.text() | st.binary().map(lambda b: b.decode("latin1")) | JSON.map(lambda j: yaml.safe_dump(j)))
@example(text="!!python/object/apply:os.system ['touch never']")
@example(text="&a [*a]")
@example(text="a: &a [x]\nb: [*a, *a]")
@example(text="out: 2024-02-30")
@example(text="? {a: b}\n: c")
@example(text="[" * 2000)
def test_a_configuration_of_any_text(text: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8", errors="replace")
    answers(lambda: load_config(file))


@PATIENT
@given(changes=st.dictionaries(KEYS | st.text(max_size=10), JSON, max_size=4))
def test_a_configuration_with_any_override(changes: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("out: runs/x\ndata: {path: texts}\n")
    answers(lambda: load_config(file, changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    writer = RunWriter(folder, ["t"])
    writer.add_account(0, "t", 1.0, 0.0, 0.0, 1.0, 0.0)
    writer.close()
    return folder


@PATIENT
@given(
    key=st.sampled_from(["version", "targets", "ids", "info", "parts", "new"]),
    value=JSON,
    signed=st.booleans(),
)
def test_a_run_header_with_any_field(
    key: str, value: object, signed: bool, run: Path, tmp_path: Path
) -> None:
    fields = {k: v for k, v in json.loads((run / "run.json").read_text()).items() if k != "crc32"} | {
        key: value
    }
    copy = tmp_path / "run"
    shutil.copytree(run, copy, dirs_exist_ok=True)
    (copy / "run.json").write_text(json.dumps(fields | {"crc32": checksum(fields) if signed else "0"}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AssayWarning)  # parts that the header promises and that are not there
        answers(lambda: [open_ledger(copy).account(target) for target in open_ledger(copy).targets])
        answers(lambda: examine(copy))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    killed.build(folder, "random")
    return folder


@PATIENT
@given(
    file=st.sampled_from(["index.json", "rows/manifest.json", "curvature/curvature.json"]),
    pick=st.integers(0, 20),
    value=JSON,
    signed=st.booleans(),
)
def test_an_index_with_any_field(
    file: str, pick: int, value: object, signed: bool, index: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "index"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(index, copy)
    fields = {k: v for k, v in json.loads((copy / file).read_text()).items() if k != "crc32"}
    key = [*fields, "new"][pick % (len(fields) + 1)]
    fields[key] = value
    (copy / file).write_text(json.dumps(fields | {"crc32": _checksum(fields) if signed else "0"}))
    answers(lambda: RowReader(Folder(copy / "rows")).read(0, 1))
    answers(lambda: Index.open(copy))
    answers(lambda: examine(copy))
