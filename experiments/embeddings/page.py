"""Sections of `docs/results.md` on data value embeddings."""

from __future__ import annotations

from collections.abc import Callable
from math import log10
from typing import Any

from experiments.tables import Result, table

DECADES = 4  # of the plot
REMOVALS = ("single step", "last epoch", "all epochs")


def mnist(r: Result) -> str:
    """Spearman by form, run by run."""
    parts = [
        f"## Data value embeddings against retraining\n\n{r['model']}; {r['training']}, seed {r['seed']}. "
        f"{r['removals']} removals each of a sample's term in one random step, in one of the last epoch, and in all "
        "epochs; the truth is honest retraining in float64. Spearman over the removals, the mean over "
        f"{r['queries']} queries. `layer` is the published block structure and `fisher` the published curvature; "
        "`random` and `pca` are the projections and their rank, `none` is the same recursion with nothing projected, "
        "`√K` in coordinates √D w.\n"
    ]
    for run, rows in sorted(
        r["parts"].items(), key=lambda part: (part[0].split()[0], float(part[0].split()[1]))
    ):
        found: dict[tuple[str, ...], dict[str, float]] = {}
        for row in rows:
            found.setdefault(_form(row), {})[row["removal"]] = row["spearman"]
        lines = [[*form, *(f"{scores[kind]:.2f}" for kind in REMOVALS)] for form, scores in found.items()]
        parts.append(table([run, "curvature", "blocks", "state", *REMOVALS], lines))
    return "\n".join(parts)


def _form(row: dict[str, Any]) -> tuple[str, ...]:
    if row["method"] != "embedding":
        return row["method"], "", "", ""
    state = "w, m" if row["momentum"] else "w"
    return row["projection"], row["curvature"], row["blocks"], state


def gpt(r: Result) -> str:
    """Values for a late target, then Spearman against retraining."""
    parts = [f"## Data value embeddings on a small GPT\n\n{r['model']}; {r['training']}, seed {r['seed']}.\n"]
    if "values" in r["parts"]:
        lines = [
            [row["projection"], row["path"], f"{row['by_id']:.3f}", f"{row['by_row']:.3f}"]
            for row in r["parts"]["values"]
        ]
        parts.append(
            "`value_for` a target that training did not know, beside the values of the same target computed while it "
            "ran: Spearman over the samples, and over samples and steps.\n"
        )
        parts.append(table(["projection", "path", "by id", "by row"], lines))
    if "fidelity" in r["parts"]:
        found: dict[tuple[str, ...], dict[str, float]] = {}
        for row in r["parts"]["fidelity"]:
            found.setdefault(_form(row), {})[row["removal"]] = row["spearman"]
        lines = [[*form, *(f"{scores[kind]:.2f}" for kind in REMOVALS[:2])] for form, scores in found.items()]
        parts.append(f"{r['removals']} removals each and {r['queries']} queries, against retraining.\n")
        parts.append(table(["", "curvature", "blocks", "state", *REMOVALS[:2]], lines))
    if "stages" in r["parts"]:
        parts.append(
            f"Influence on held-out text over a run of {r['long']} steps: its mean size, and that over the learning "
            "rate, by step, each over its maximum: a peak in the warm-up, a basin, an ascent to the end.\n\n"
            "![Influence over the learning rate by step](results-stages.svg)\n"
        )
    return "\n".join(parts)


def stages(r: Result) -> str:
    """The influence-by-step curve as SVG: size, and size over the learning rate, each over its own maximum."""
    rows = r["parts"].get("stages", [])
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 300" font-family="sans-serif" font-size="12">',
        "<title>Influence of the samples of each step on the final loss</title>",
        '<rect width="640" height="300" fill="white"/>',
        '<line x1="50" x2="600" y1="250" y2="250" stroke="#999"/>',
        '<text x="325" y="285" text-anchor="middle">step</text>',
    ]
    for power in range(DECADES + 1):
        y = 50 + 200 * power / DECADES
        parts.append(f'<line x1="50" x2="600" y1="{y:.0f}" y2="{y:.0f}" stroke="#ddd"/>')
        parts.append(f'<text x="44" y="{y + 4:.0f}" text-anchor="end">{10.0**-power:g}</text>')
    last = max((row["step"] for row in rows), default=1)
    for name, words, colour, x in (
        ("magnitude", "mean size of the influence", "#1f618d", 50),
        ("per_lr", "the same over the learning rate", "#c0392b", 250),
        ("lr", "learning rate", "#777", 480),
    ):
        top = max((row[name] for row in rows), default=1.0)
        decades = [max(log10(max(row[name], 1e-30) / top), -DECADES) for row in rows]
        points = " ".join(
            f"{50 + 550 * row['step'] / last:.1f},{50 - 200 * y / DECADES:.1f}"
            for row, y in zip(rows, decades, strict=True)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<text x="{x}" y="30" fill="{colour}">{words}</text>')
    for step in range(0, last + 1, max(1, last // 6)):
        parts.append(f'<text x="{50 + 550 * step / last:.1f}" y="266" text-anchor="middle">{step}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def demo(r: Result) -> str:
    """Spearman of `value_for` by form and target."""
    lines = [
        [
            form,
            *(f"{row['by_id']:.3f}" for row in rows),
            f"{rows[0]['stored_per_row'] / 1024:.0f}",
        ]
        for form, rows in r["parts"].items()
    ]
    targets = [row["target"] for row in next(iter(r["parts"].values()))]
    return (
        "## Values for a late target on the demo's run\n\n"
        f"GPT of 4 layers, width 128; {r['training']}, seed {r['seed']}. `value_for` each of the run's targets, "
        "beside their values computed while it ran: Spearman over the documents, by target. The part of a gradient "
        "that a projection drops is missing from a value; under Adam the table of the tokens loses most by that, "
        "which is why a rank of its own, the model's width, does more than a larger rank of all.\n\n"
        + table(["recorded by", *targets, "KiB stored per row"], lines)
    )


def low_rank(r: Result) -> str:
    """Time and fidelity of a low-rank M."""
    lines = [
        [
            row["width"],
            "whole" if row["rank"] is None else row["rank"],
            f"{row['seconds']:.2f}",
            f"{row['spearman']:.5f}",
            f"{row['without_curvature']:.4f}" if row["rank"] is None else "",
        ]
        for row in r["table"]
    ]
    return (
        f"## A low-rank M\n\n{r['training']}, seed {r['seed']}. The same recursion with M = U Vᵀ, cut back to its "
        "rank whenever it has twice as many columns: seconds of the processor, and Spearman of the influence with that "
        "of the whole M; in the last column that of no M at all.\n\n"
        + table(["coordinates of the block", "rank of M", "seconds", "Spearman", "without M"], lines)
    )


def support(r: Result) -> str:
    """Spearman by rank and support, what is not projected beside it where there is such a thing."""
    parts = [
        "## Reading a part of the sides\n\n`Projection(rank, support=n)` reads n coordinates of every wider side of a "
        "weight; in brackets the standard deviation over the seeds of the projection, "
        f"{r['seeds']} of them where anything is random.\n\n{r['gpt']}. `value_for` a target that training did not "
        "know beside its values computed in the run (Spearman over the rows), and the influence (Gauss-Newton of 2 "
        f"draws, layer blocks) beside retraining without a row in one step ({r['removals']} removals, Spearman over "
        "them).\n"
    ]
    text = [row for name, rows in r["parts"].items() if name.startswith("GPT") for row in rows]
    digits = {name: rows for name, rows in r["parts"].items() if not name.startswith("GPT")}
    if text:
        lines = [
            [*key, *(_with_deviation(found[column]) for column in ("value_for", "retraining"))]
            for key, found in _by(text, "against").items()
        ]
        parts.append(table(["projection", "support", "`value_for`", "retraining"], lines))
    for name, rows in digits.items():
        parts.append(
            f"{name.removeprefix('digits ')}, digits: {r['digits']}; Gauss-Newton with layer blocks beside "
            "retraining.\n"
        )
        own = [row for row in rows if row["curvature"] == "ggn"]
        lines = [
            [*key, *(_with_deviation(found[kind]) for kind in REMOVALS)]
            for key, found in _by(own, "removal").items()
        ]
        parts.append(table(["projection", "support", *REMOVALS], lines))
    return "\n".join(parts)


def _by(rows: list[dict[str, Any]], column: str) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """By projection and support, the rows by another column."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        support = "whole sides" if row["times"] is None else str(row["times"] * row["rank"])
        found.setdefault((f"{row['projection']} {row['rank']}", support), {})[row[column]] = row
    return found


def _with_deviation(row: dict[str, Any]) -> str:
    spread = "" if row["deviation"] is None else f" ({row['deviation']:.2f})"
    return f"{row['spearman']:.2f}{spread}"


SECTIONS: dict[str, Callable[[Result], str]] = {
    "embeddings_mnist": mnist,
    "embeddings_gpt": gpt,
    "embeddings_demo": demo,
    "embeddings_low_rank": low_rank,
    "embeddings_support": support,
}
PLOTS: dict[str, tuple[str, Callable[[Result], str]]] = {"results-stages.svg": ("embeddings_gpt", stages)}
