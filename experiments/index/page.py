"""The page's sections on the influence index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from experiments.tables import Result, by, order, table

__all__ = ["PLOTS", "SECTIONS"]


def interval(row: Result, prefix: str = "") -> str:
    """The ends of a row's interval."""
    return f"{row[f'{prefix}low']:.3f} to {row[f'{prefix}high']:.3f}"


def scores(r: Result, title: str) -> str:
    """Methods, differences, the damping sweep and the other libraries."""
    rows = [
        [
            row["method"],
            f"**{row['lds']:.3f}**",
            interval(row),
            f"{row['held_out']:.3f}",
            f"{row['ensemble']:.3f}",
            f"{row['seconds']:.1f}",
        ]
        for row in r["table"]
    ]
    parts = [
        f"## {title}\n\n{r['model']}; {r['training']}. Linear datamodeling score against {r['truth']}; "
        f"{r['queries']} queries, mean over {len(r['checkpoints'])} checkpoints query by query, 95 % bootstrap "
        f"interval over the queries. Damping 0.1 × the mean eigenvalue of each layer, projections of rank {r['rank']}. "
        "*Tuned*: damping (and rank) chosen by `index.tune` on half of the queries and scored on the other half. *All "
        "checkpoints*: influence summed over them first. Seconds: building and asking, on a busy core.\n\n"
        + table(["method", "LDS", "interval", "tuned", "all checkpoints", "seconds"], rows)
    ]
    compared = [[f"{d['better']} − {d['worse']}", f"{d['mean']:+.3f}", interval(d)] for d in r["differences"]]
    parts.append(
        "Differences on the same queries; one whose interval holds 0 is none that this experiment can show.\n\n"
        + table(["difference", "LDS", "interval"], compared)
    )
    found = by(r["sweep"], "method", "rank", "damping")
    dampings = sorted({row["damping"] for row in r["sweep"] if row["damping"]})
    lines = []
    for method in order(r["sweep"], "method"):
        ranks = list(dict.fromkeys(row["rank"] for row in r["sweep"] if row["method"] == method))
        for rank in ranks:
            cells = [found.get((method, rank, damping)) for damping in dampings]
            if not any(cells):
                continue
            best = max(cell["lds"] for cell in cells if cell)
            texts = [
                ""
                if cell is None
                else f"**{cell['lds']:.3f}**"
                if cell["lds"] == best
                else f"{cell['lds']:.3f}"
                for cell in cells
            ]
            lines.append([method if rank is None else f"{method}, rank {rank}", *texts])
    parts.append(
        "The same by damping, in mean eigenvalues of each layer; each row's optimum in bold.\n\n"
        + table(["method", *(f"{damping:g}" for damping in dampings)], lines)
    )
    peers = [
        [
            f"{row['package']} {row['version']}",
            row["method"],
            *(
                ["–", row["failed"].replace("|", "/"), ""]
                if "failed" in row
                else [f"{row['lds']:.3f}", interval(row), f"{row['seconds']:.1f}"]
            ),
        ]
        for row in r["peers"]
    ]
    parts.append(
        "Other libraries on the very same checkpoints (installed beside assay; a row is left out where its library is "
        "not installed, and says so where the library did not run with the adapter that is used here).\n\n"
        + table(["library", "method", "LDS", "interval", "seconds"], peers)
    )
    return "\n".join(parts)


def paraphrases(r: Result) -> str:
    """The index of a real language model."""
    rows = [
        [
            "(F + λI)⁻¹" if row["curvature"] == "fisher" else "cosine",
            f"{row['mean_rank']:.1f}",
            f"{row['median_rank']:g}",
            f"{row['recall_at_1']:.2f}",
            f"{row['recall_at_10']:.2f}",
        ]
        for row in r["paraphrases"]
    ]
    asked = [
        f"* *{question['text'][:160]}*\n"
        + "".join(f"    * {s['id']}: {s['text']}\n" for s in question["sources"])
        for question in r["continuations"]
    ]
    return (
        f"## Sources of a real language model\n\n{r['model']} ({r['package']}); {r['documents']:,} mini-Pile documents "
        f"and {r['verses']} Bible verses, the first {r['tokens']} tokens of each; the MLPs of all blocks at rank "
        f"{r['rank']}, {r['row']:,} numbers per document. Every verse is asked for in another translation: at which "
        "rank does it come back? Gradients of unit length.\n\n"
        + table(["curvature", "mean rank", "median rank", "recall at 1", "recall at 10"], rows)
        + "\nWhat the model says after a prompt, and the documents that point its weights the same way. It was not "
        "trained on them.\n\n" + "".join(asked)
    )


SECTIONS: dict[str, Callable[[Result], str]] = {
    "index_mnist": lambda r: scores(r, "Influence on an MLP against retraining on subsets"),
    "index_gpt": lambda r: scores(r, "Influence on a tiny GPT against retraining on subsets"),
}
if (Path(__file__).parents[1] / "results" / "smollm2.json").exists():  # needs a model of another package
    SECTIONS["smollm2"] = paraphrases
PLOTS: dict[str, tuple[str, Callable[[Result], str]]] = {}
