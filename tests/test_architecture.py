"""The page on architecture says of every room what it may import: the source imports that, and nothing else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "assay"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROOMS = {
    "assay",
    *(path.stem for path in SOURCE.glob("*.py") if path.stem != "__init__"),
    *(path.parent.name for path in SOURCE.glob("*/__init__.py")),
}


class Imports(NamedTuple):
    """What a room imports: at once, and inside functions or for the type checker alone."""

    at_once: set[str]
    later: set[str]


def told() -> dict[str, Imports]:
    """By room, in the table's order."""
    found: dict[str, Imports] = {}
    for room, imports in re.findall(r"^\| `assay\.?(\w*)` \|[^|]*\|([^|]*)\|", PAGE, flags=re.M):
        later = " ".join(re.findall(r"\((.*?)\)", imports))
        at_once = re.sub(r"\(.*?\)", "", imports)
        found[room or "assay"] = Imports(*(set(re.findall(r"\w+", names)) for names in (at_once, later)))
    return found


def for_all() -> set[str]:
    """What every room may import."""
    sentence = re.search(r"every one may import (.*)\n", PAGE)
    assert sentence is not None
    return set(re.findall(r"`assay\.(\w+)`", sentence[1]))


def nodes(tree: ast.AST, later: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import below a node, and whether it waits: it is not run when the module is."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, later
        waits = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
        waits |= isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield from nodes(child, later or waits)


def named(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The rooms that an import names."""
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports within assay name the whole path"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        names = [alias.name for alias in node.names]
    for name in names:
        package, _, rest = name.partition(".")
        room = rest.partition(".")[0]
        if package == "assay":
            yield room if room in ROOMS else "assay"


def imported(source: str, room: str) -> Imports:
    """What a module of a room imports of others."""
    found = Imports(set(), set())
    for node, later in nodes(ast.parse(source)):
        (found.later if later else found.at_once).update({*named(node)} - {room, *for_all()})
    return found


def in_the_source() -> dict[str, Imports]:
    found = {room: Imports(set(), set()) for room in ROOMS}
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).with_suffix("").parts[0]
        room = "assay" if name == "__init__" else name
        for known, new in zip(found[room], imported(path.read_text(encoding="utf-8"), room), strict=True):
            known |= new
    return {room: Imports(of.at_once, of.later - of.at_once) for room, of in found.items()}


def test_the_source_imports_what_the_page_says() -> None:
    page, source = told(), in_the_source()
    assert page.keys() == source.keys()
    for room, imports in source.items():
        assert page[room] == imports, room


def test_a_room_imports_what_stands_above_it() -> None:
    above: set[str] = set()
    for room, imports in told().items():
        assert imports.at_once <= above, room
        above.add(room)
    assert for_all() == {"errors", "names"}
    assert imported((SOURCE / "names.py").read_text(encoding="utf-8"), "names") == Imports(set(), set())


def test_what_is_taken_for_an_import() -> None:
    source = """
import assay.store.files, os
from assay import Target, plan
from assay.errors import InputError
from assay.run import Run
if TYPE_CHECKING:
    from assay.rows import Folder
class A:
    from assay.index import Index
    def b(self):
        if self:
            import assay.replay
"""
    expected = Imports({"store", "assay", "plan", "index"}, {"rows", "replay"})
    assert imported(source, "run") == expected
