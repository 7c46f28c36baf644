"""Write `docs/results.md` and its plots from the JSON results: `python -m experiments.page`.

Each topic has a folder with a `page.py`: `SECTIONS` names a result and the function that turns it into Markdown,
`PLOTS` names a file under `docs/`, the result it is drawn from, and the function that draws it.
"""

from __future__ import annotations

import json
from pathlib import Path

from experiments.adjoint import page as adjoint
from experiments.embeddings import page as embeddings
from experiments.evidence import page as evidence
from experiments.index import page as index
from experiments.paths import page as paths
from experiments.tables import Result

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
DOCS = ROOT / "docs"
PAGE = DOCS / "results.md"
TOPICS = (evidence, paths, embeddings, index, adjoint)

HEAD = """# Results

Every table is made by one command, with its seeds in the JSON file of the same name under `experiments/results/`;
`python -m experiments.page` writes this page from those files. The experiments are small enough for one CPU core and
a few minutes: the models have tens of thousands of parameters, so read the figures as statements about the
mathematics, not about large models.
"""


def result(name: str) -> Result:
    """What an experiment left."""
    found: Result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def page() -> str:
    """The page, from the results."""
    parts = [HEAD]
    for topic in TOPICS:
        for name, section in topic.SECTIONS.items():
            found = result(name)
            parts.append(
                section(found) + f"\n`{found['command']}` · torch {found['torch']} · {found['seconds']} s\n"
            )
    return "\n".join(parts)


def plots() -> dict[Path, str]:
    """Every plot by its file."""
    return {DOCS / file: draw(result(name)) for topic in TOPICS for file, (name, draw) in topic.PLOTS.items()}


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    for file, drawing in plots().items():
        file.write_text(drawing, encoding="utf-8")
