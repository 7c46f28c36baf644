"""The package as it is installed: what it imports, what it ships, and that it says what it offers."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import assay

ROOT = Path(__file__).parents[1]
OPTIONAL = {
    "jinja2",
    "plotly",
    "pydantic",
    "scipy",
    "sklearn",
    "tensorstore",
    "tokenizers",
    "transformers",
    "yaml",
}


def python(code: str) -> str:
    """Run `code` in an interpreter of its own, with warnings as errors, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_takes_less_than_a_second_beyond_torch() -> None:
    clock = "time.process_time()"  # of the processor, and the least of three: whatever else runs only adds
    code = f"import torch, time; start = {clock}; import assay; assay.Run; print({clock} - start)"
    assert min(float(python(code)) for _ in range(3)) < 1.0


def test_import_leaves_the_extras_alone() -> None:
    code = "import sys, torch; before = set(sys.modules); import assay; assay.Run; print(*set(sys.modules) - before)"
    imported = {name.partition(".")[0] for name in python(code).split()}
    assert "assay" in imported
    assert imported & OPTIONAL == set()


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = "import sys, assay, assay.cli.app; print({'torch', 'polars', 'numpy'} & set(sys.modules))"
    assert python(code) == "set()\n"
    code = "import assay; print(assay.capture.probe.__name__, assay.open.__name__)"
    assert python(code) == "assay.capture.probe open_ledger\n"
    code = (
        "import assay; print(hasattr(assay, 'nothing'), hasattr(assay, '__wrapped__'), 'Run' in dir(assay))"
    )
    assert python(code) == "False False True\n"


MODULES = ["assay", *(found.name for found in pkgutil.walk_packages(assay.__path__, "assay."))]


def members(owner: Any) -> Iterator[tuple[str, Any]]:
    """The public functions, methods and properties that `owner` (a class) defines itself."""
    for name, member in vars(owner).items():
        member = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            yield name, member


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_public_names_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    for public in (getattr(module, public) for public in getattr(module, "__all__", [])):
        if not (inspect.isclass(public) or inspect.isfunction(public)):
            continue
        assert public.__doc__, f"{name}: {public.__name__} has no docstring"
        for method, member in members(public) if inspect.isclass(public) else ():
            assert member.__doc__, f"{name}: {public.__name__}.{method} has no docstring"


def test_the_interface_is_public() -> None:
    for name in assay.__all__:
        assert hasattr(assay, name)


def test_every_decision_is_listed_by_its_name() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = re.findall(
        r"^- \[(\d{4})\]\((\S+)\) (.+)$", (folder / "README.md").read_text(encoding="utf-8"), re.M
    )
    records = sorted(folder.glob("[0-9]*.md"))
    assert [name for _, name, _ in listed] == [record.name for record in records]
    for (number, _, title), record in zip(listed, records, strict=True):
        assert record.read_text(encoding="utf-8").startswith(f"# {number}. {title}\n")


def test_wheel_ships_everything_that_lies_in_the_package(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("assay-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if name.startswith("assay/")}
        metadata = archive.read(f"assay-{assay.__version__}.dist-info/METADATA").decode()
    source = ROOT / "src"
    lies_there = {
        path.relative_to(source).as_posix()
        for path in (source / "assay").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "assay/py.typed" in shipped
    assert shipped == lies_there
    assert "License-Expression: Apache-2.0" in metadata


def test_the_loop_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, _trainer = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))

    def loss_fn(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(model(batch[:, :4]), batch[:, 4:])

    names = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "loss_fn": loss_fn,
        "held_out_batches": [torch.randn(6, 5)],
        "loader": [([f"{step}-{i}" for i in range(3)], torch.randn(3, 5)) for step in range(4)],
    }
    monkeypatch.chdir(tmp_path)
    exec(loop, names)
    values, account = names["ledger"].values("code"), names["ledger"].account("code")
    assert set(values["id"]) == {f"{step}-{i}" for step in range(4) for i in range(3)}
    assert values["value"].sum() == pytest.approx(account["predicted"].sum())
    assert account["actual"].is_finite().all()
    assert (account["actual"] != 0).all()
