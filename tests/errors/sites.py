"""Every place in the source where assay raises an error of its own, and the form of the message that it raises."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "assay"
OWN = frozenset(
    {
        "AssayError",
        "InputError",
        "StoreError",
        "UnreadableError",
        "CoverageError",
        "UnsupportedOptimizerError",
    }
)  # assay.errors
VALUE = "…"


@dataclass(frozen=True)
class Site:
    """One place.

    Args:
        where: file and function, `store/ids.py _items`.
        form: the message with `…` for what differs from time to time; of a call of a function that makes the error,
            the text handed to it.
        made_elsewhere: whether it is such a call.
        pattern: what the message matches.
    """

    where: str
    form: str
    made_elsewhere: bool
    pattern: str

    def matches(self, frames: list[str], message: str) -> bool:
        """Whether an error with this message, raised below these functions (innermost first), comes from here."""
        if self.made_elsewhere:
            return self.where in frames[1:] and re.search(self.pattern, message, re.DOTALL) is not None
        return frames[:1] == [self.where] and re.fullmatch(self.pattern, message, re.DOTALL) is not None


@lru_cache(maxsize=1)
def sites() -> list[Site]:
    """All of them, file by file."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}
    makers = {
        node.name
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.returns is not None and ast.unparse(node.returns) in OWN
    } | {"refuse"}  # the capture's, which raises what it makes
    found = [
        site
        for path, tree in trees.items()
        for site in _in(tree, path.relative_to(SOURCE).as_posix(), "", makers)
    ]
    return list(dict.fromkeys(found))


def _in(node: ast.AST, file: str, function: str, makers: set[str]) -> Iterator[Site]:
    for child in ast.iter_child_nodes(node):
        inside = (
            child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
        )  # the innermost function, as a frame names it
        if isinstance(child, ast.Call):
            name = ast.unparse(child.func).rpartition(".")[2]
            where = f"{file} {function or '<module>'}"
            if name in OWN and child.args:
                yield Site(where, _form(child.args[0]), False, _pattern(child.args[0]))
            elif name in makers and function not in makers:
                texts = [a for a in child.args if isinstance(a, (ast.Constant, ast.JoinedStr, ast.IfExp))]
                text = next((a for a in texts if len(_form(a)) > 3), None)
                if text is not None:
                    yield Site(where, _form(text), True, _pattern(text))
        yield from _in(child, file, inside, makers)


def _form(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return " ".join(node.value.split())
    if isinstance(node, ast.JoinedStr):
        parts = [str(v.value) if isinstance(v, ast.Constant) else VALUE for v in node.values]
        return " ".join("".join(parts).split())
    if isinstance(node, ast.BinOp):
        return _form(node.left) + " " + _form(node.right)
    if isinstance(node, ast.IfExp):
        return f"{_form(node.body)} / {_form(node.orelse)}"
    return VALUE


def _pattern(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(re.escape(str(v.value)) if isinstance(v, ast.Constant) else ".*" for v in node.values)
    if isinstance(node, ast.BinOp):
        return _pattern(node.left) + _pattern(node.right)
    if isinstance(node, ast.IfExp):
        return f"(?:{_pattern(node.body)}|{_pattern(node.orelse)})"
    return ".*"
