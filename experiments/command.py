"""How an experiment is run as a command, and how its result is kept."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch

from experiments.settings import FORMS, S, Settings, read_settings

RESULTS = Path(__file__).parent / "results"
CACHE = Path(__file__).parent / "cache"


def run_as_command(
    name: str, module: str, experiment: Callable[..., dict[str, Any]], cached: bool = False
) -> None:
    """Run an experiment and keep its result as JSON; `--out` chooses another folder.

    Args:
        name: of the JSON file.
        module: that is run, such as "paths.adam".
        experiment: gives the result.
        cached: the experiment takes the folder in which its retrainings are kept, `--cache`.
    """
    parser = argparse.ArgumentParser(description=experiment.__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    if cached:
        parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the retrainings")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    result = experiment(options.cache) if cached else experiment()
    result["seconds"] = round(time.perf_counter() - started)
    keep(options.out / f"{name}.json", result | _provenance(module))


def run_parts_as_command(
    name: str, module: str, parts: Mapping[str, Callable[[], list[Any]]], about: Mapping[str, Any]
) -> None:
    """Run the parts of an experiment and keep their results as one JSON; `--out` chooses another folder.

    Parts that are there already are left alone, so that an experiment that was stopped goes on; `--fresh` begins anew.

    Args:
        name: of the JSON file.
        module: that is run, such as "embeddings.mnist".
        parts: name → what computes it.
        about: settings, kept with the results.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = options.out / f"{name}.json"
    result: dict[str, Any] = {**about, "parts": {}, "seconds": 0.0}
    if file.exists() and not options.fresh:
        result = json.loads(file.read_text(encoding="utf-8")) | about
    for part, compute in parts.items():
        if part in result["parts"]:
            continue
        started = time.process_time()
        result["parts"][part] = compute()
        result["seconds"] = round(result["seconds"] + time.process_time() - started)
        keep(file, result | _provenance(module))


class Pieces:
    """A folder that keeps what an experiment has computed on the way, so that one that was stopped goes on.

    Args:
        folder: of the pieces.
        settings: what was computed with others is computed again.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self.about = rounded(settings.model_dump(mode="json", exclude={"seeds"}))
        self.seconds = 0.0
        """What computing the pieces took that were found here."""

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of a piece, JSON-able: found or computed."""
        file = self.folder / f"{name}.json"
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["about"] == self.about:
                self.seconds += found["seconds"]
                return found["result"]
        started = time.process_time()
        result = rounded(compute())
        keep(file, {"about": self.about, "seconds": time.process_time() - started, "result": result})
        return result


def run_seeds_as_command(
    name: str,
    module: str,
    settings: tuple[type[S], Path],
    one: Callable[[S, int, Path], dict[str, Any]],
    summary: Callable[[S, list[dict[str, Any]]], dict[str, Any]],
) -> None:
    """Run an experiment seed by seed, and keep what each gave and what they give together as JSON.

    Seeds that are there already, made with the same settings, are left alone; `--fresh` begins anew. `--quick` and
    `--tiny` run the smaller forms, whose results do not go to the page.

    Args:
        name: of the JSON file.
        module: that is run, such as "evidence.curation".
        settings: their type and their YAML.
        one: `one(settings, seed, cache)`, the result of a seed; `cache` is a folder for what others may use too, in
            which its own is below `name`. What it did not compute itself, `Pieces.seconds`, it says in "found_seconds".
        summary: `summary(settings, results)`, the result of all.
    """
    options = _options_of_forms(one.__doc__)
    torch.set_num_threads(1)
    chosen = read_settings(*settings, options.form)
    cache = options.cache / options.form
    out = options.out or (RESULTS if options.form == "full" else cache)
    file, about = out / f"{name}.json", rounded(chosen.model_dump(mode="json", exclude={"seeds"}))
    result: dict[str, Any] = {"settings": about, "by_seed": {}, "seconds": 0.0}
    if options.fresh:
        rmtree(cache / name, ignore_errors=True)
    elif file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        result = found if found["settings"] == about else result
    for seed in chosen.seeds:
        if str(seed) not in result["by_seed"]:
            started = time.process_time()
            found = one(chosen, seed, cache)
            spent = time.process_time() - started + found.pop("found_seconds", 0.0)
            result["by_seed"][str(seed)] = rounded(found)
            result["seconds"] = round(result["seconds"] + spent, 1)
        done = [seed for seed in chosen.seeds if str(seed) in result["by_seed"]]
        together = summary(chosen, [result["by_seed"][str(seed)] for seed in done])
        keep(file, result | {"seeds": done} | together | _provenance(module))


def _options_of_forms(about: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", type=Path, default=None, help="folder of the result")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of what is trained")
    parser.add_argument("--fresh", action="store_true", help="forget what is done")
    forms = parser.add_mutually_exclusive_group()
    for form in FORMS[1:]:
        forms.add_argument(f"--{form}", dest="form", action="store_const", const=form, default="full")
    return parser.parse_args()


def keep(file: Path, result: Mapping[str, Any]) -> None:
    """Write a result, its numbers to six digits."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    """The same with every number to six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def _provenance(module: str) -> dict[str, str]:
    return {"command": f"python -m experiments.{module}", "torch": torch.__version__.split("+")[0]}
