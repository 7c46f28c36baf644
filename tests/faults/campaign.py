"""Kill runs, index builds and passes of embeddings at random moments, and begin them again until they end.

    python tests/faults/campaign.py [--kills 200] [--seed 0] [--out benchmarks/results/faults.json]

Each life of a piece of work is a process of its own, killed by SIGKILL after a random time unless it ends before. After
every kill everything must open, hold what was acknowledged and pass `assay.doctor`; at the end it must hold the very
same answers as work that nobody disturbed. The first thing that does not ends the campaign with an error. Afterwards
`python scripts/robustness.py` puts the committed results into the documentation.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import tensorstore  # noqa: F401  (loaded before the forks, so that a life is work and not the loading of libraries)
import torch
import torch._dynamo

sys.path.insert(0, str(Path(__file__).parents[1]))

LIVES = 8  # kills of one piece of work; then it is let live

from faults.victims import VICTIMS, answers, committed  # noqa: E402

import assay.embedding.session  # noqa: E402
import assay.index.build  # noqa: E402, F401
from assay.doctor import examine  # noqa: E402


def live(kind: str, folder: Path, seconds: float | None) -> bool:
    """One life of a piece of work, `seconds` long; whether it came to its end by itself.

    The child is a fork, so that a life costs no start of an interpreter; this process itself never uses a library
    whose threads a fork would not carry over.
    """
    child = os.fork()
    if child == 0:
        os.dup2(os.open(f"{folder}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        status = 1
        try:
            VICTIMS[kind](folder)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        said = Path(f"{folder}.err").read_text().strip() or "nothing"
        raise AssertionError(f"{kind} in {folder} failed instead of going on: {said}")
    return not os.WIFSIGNALED(status)


def apart(kind: str, folder: Path, what: str) -> Any:
    """`check(...)` or the answers, found by a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found = look(kind, folder) if what == "look" else answers(kind, folder)
            with os.fdopen(writing, "w") as pipe:
                json.dump({"found": found}, pipe)
        except BaseException:
            with os.fdopen(writing, "w") as pipe:
                json.dump({"error": traceback.format_exc()}, pipe)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read() or '{"error": "the process died without a word"}'
    os.waitpid(child, 0)
    said = json.loads(text)
    if "error" in said:
        raise AssertionError(f"{kind} in {folder} cannot be read after a kill: {said['error']}")
    return said["found"]


def look(kind: str, folder: Path) -> tuple[int, int]:
    """How much is committed and how much was acknowledged; everything that is there is whole."""
    warnings.simplefilter("error")
    parts = [path for path in folder.iterdir() if path.is_dir() and any(path.iterdir())]
    for part in parts:
        if (part / "run.json").exists() or (part / "index.json").exists():
            diagnosis = examine(part)
            assert diagnosis.whole, diagnosis.findings
    acknowledged = folder / "acknowledged"
    promised = int(acknowledged.read_text()) if acknowledged.exists() and kind != "embedding" else 0
    found = committed(kind, folder) if kind != "embedding" else 0
    return found, promised


def campaign(kills: int, seed: int, place: Path, lives_at_most: int = LIVES) -> dict[str, dict[str, int]]:
    """Kill until there have been so many kills, of the kinds of work in turn."""
    dice, counts = random.Random(seed), {kind: Counter[str]() for kind in VICTIMS}
    whole, length = {}, {}
    for kind in ("record", "run", "index", "embedding"):
        folder = begun(kind, place / f"whole-{kind}", place)
        started = time.perf_counter()
        assert live(kind, folder, None)
        length[kind] = time.perf_counter() - started
        whole[kind] = apart(kind, folder, "answers")
    number = 0
    while sum(count["kills"] for count in counts.values()) < kills:
        kind = list(VICTIMS)[number % len(VICTIMS)]
        number += 1
        folder, lives, before = begun(kind, place / f"{kind}-{number}", place), 0, 0
        while not live(kind, folder, dice.uniform(0, length[kind]) if lives < lives_at_most else None):
            lives += 1
            counts[kind]["kills"] += 1
            now, promised = apart(kind, folder, "look")
            promised = max(promised, before)  # what was once read as committed counts as acknowledged, too
            counts[kind]["acknowledged"] += promised
            counts[kind]["lost"] += max(0, promised - now)
            assert now >= promised, f"{kind} had committed {promised} and now has {now}"
            before = now if kind == "index" else 0  # a training goes back to its checkpoint
        found = apart(kind, folder, "answers")
        other = sorted({name for name, _ in found.items() ^ whole[kind].items()})
        assert not other, f"{kind} ended otherwise than unbroken: {', '.join(other)}"
        counts[kind]["ended the same"] += 1
        shutil.rmtree(folder)
    return {kind: dict(count) for kind, count in counts.items()}


def begun(kind: str, folder: Path, place: Path) -> Path:
    """A folder for a piece of work; embeddings are built of a whole recording."""
    if kind == "embedding":
        shutil.copytree(place / "whole-record", folder)
    else:
        folder.mkdir()
    return folder


def main() -> None:
    """Run the campaign and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lives", type=int, default=LIVES, help="kills of one piece of work")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        found = campaign(options.kills, options.seed, Path(place), options.lives)
    text = json.dumps(
        {
            "command": f"python tests/faults/campaign.py --kills {options.kills} --seed {options.seed}",
            **found,
        },
        indent=1,
    )
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
