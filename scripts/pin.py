"""Print one constraint per package of this interpreter's environment; `make constraints` writes them down.

A package that no longer supports the oldest Python of ``pyproject.toml`` is pinned only where it can be
installed; there an older Python takes what the ranges of ``pyproject.toml`` allow.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import distributions

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

OLDEST = "3.10.0"
HERE = ".".join(map(str, sys.version_info[:2]))
FIRST, EXACTLY = f"{HERE}.0", ".".join(map(str, sys.version_info[:3]))
NOT_PINNED = {"assay", "pip", "setuptools", "wheel"}  # the project itself, and what came with the interpreter


def pins() -> Iterator[str]:
    """Yield ``name==version`` without a local suffix, with a marker where an older Python cannot have it."""
    for package in sorted(distributions(), key=lambda package: canonicalize_name(package.name)):
        name = canonicalize_name(package.name)
        if name in NOT_PINNED:
            continue
        needs = SpecifierSet(package.metadata.get("Requires-Python", ""))
        marker = ""
        if not needs.contains(FIRST):  # a later patch of this Python
            marker = f'; python_full_version >= "{EXACTLY}"'
        elif not needs.contains(OLDEST):
            marker = f'; python_version >= "{HERE}"'
        yield f"{name}=={Version(package.version).public}{marker}"


if __name__ == "__main__":
    print(
        "# What CI installs, package for package, by `make constraints`; torch and triton are kept by hand."
    )
    print("\n".join(pins()))
