"""A build that was killed, wherever it was, and called again ends with the bytes of an unbroken one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from index import killed

from assay.errors import StoreError
from assay.index import Index
from assay.rows import Folder, writer


class Killed(BaseException):
    """Nothing that the library could catch."""


def content(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def die_at(n: int, before: bool, patch: pytest.MonkeyPatch) -> None:
    """Raise at the n-th time that something is written."""
    count = 0

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            due = count == n  # calls lie within calls
            if due and before:
                raise Killed
            result = call(*args, **kwargs)
            if due:
                raise Killed
            return result

        return wrapped

    for where, name in (
        (Folder, "write"), (Folder, "create_array"), (writer, "put"), (writer, "resized"),
    ):  # fmt: skip
        patch.setattr(where, name, around(getattr(where, name)))


@pytest.mark.parametrize("kind", ["random", "pca"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_at_every_write(kind: str, before: bool, tmp_path: Path) -> None:
    killed.build(tmp_path / "whole", kind)
    whole, finished = content(tmp_path / "whole"), False
    for n in range(1, 200):
        out = tmp_path / str(n)
        with pytest.MonkeyPatch.context() as patch:
            die_at(n, before, patch)
            try:
                killed.build(out, kind)
                finished = True
            except Killed:
                pass
        if finished:
            break
        if "curvature/curvature.json" not in content(out):
            with pytest.raises(StoreError):
                Index.open(out)
            killed.build(out, kind)
        assert content(out) == whole
    assert finished
    assert n > 25


def test_by_the_system_at_random_moments(tmp_path: Path) -> None:
    killed.build(tmp_path / "whole", "random", killed.Examples(12))
    out, dice, kills = tmp_path / "killed", random.Random(0), 0
    for _ in range(30):
        child = subprocess.Popen(
            [sys.executable, killed.__file__, str(out), "random"], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        for _ in range(dice.randint(2, 6)):
            if not child.stdout.readline():
                break
        else:
            child.kill()
            kills += 1
        child.wait()
        child.stdout.close()
        if child.returncode == 0:
            break
    assert kills >= 2
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", ["random", "pca"])
def test_by_the_system_at_any_time(kind: str, parts: int, tmp_path: Path) -> None:
    """SIGKILL after a random while, wherever the build and its writing thread then are."""
    killed.build(tmp_path / "whole", kind, killed.Examples(40))
    out, dice, kills = tmp_path / "killed", random.Random(parts), 0
    command = [sys.executable, killed.__file__, str(out), kind, "serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        for part in range(parts):
            wait = 0.01
            for _ in range(100):
                server.stdin.write(f"{part} {parts}\n")
                server.stdin.flush()
                child = int(server.stdout.readline())
                time.sleep(dice.uniform(0, wait))
                with suppress(ProcessLookupError):  # it had ended, and the server has waited for it
                    os.kill(child, signal.SIGKILL)
                if int(server.stdout.readline()) == 0:
                    break
                kills += 1
                wait = min(1.4 * wait, 2.0)  # the first are killed while they begin, the last get further
            else:
                pytest.fail("a build never ended")
        server.stdin.close()
    assert kills >= 6 * parts
    if parts > 1:
        Index.join(out, parts)
    assert content(out) == content(tmp_path / "whole")


def test_parts_wait_for_the_first_and_a_join_for_all(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no index"):
        Index.join(tmp_path / "parts", 2)
    killed.build_part(tmp_path / "parts", "random", 0, 2)
    with pytest.raises(StoreError, match="part 1 of 2 is not complete"):
        Index.join(tmp_path / "parts", 2)
    with pytest.raises(StoreError, match=r"no rows|not complete"):
        Index.open(tmp_path / "parts")
    killed.build_part(tmp_path / "parts", "random", 1, 2)
    killed.build_part(tmp_path / "parts", "random", 1, 2)  # nothing is left to do
    Index.join(tmp_path / "parts", 2)
    killed.build(tmp_path / "whole", "random")
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    with pytest.raises(StoreError, match="already holds"):
        killed.build_part(tmp_path / "parts", "random", 0, 2)


def test_other_settings_do_not_go_on(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        die_at(20, True, patch)
        with pytest.raises(Killed):
            killed.build(tmp_path, "random")
    with pytest.raises(StoreError, match="another projection"):
        killed.build(tmp_path, "none")
    with pytest.raises(StoreError, match="other examples"):
        killed.build(tmp_path, "random", [(list(range(1, 60)), None)])
