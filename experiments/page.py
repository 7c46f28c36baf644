"""Write `docs/results.md` from the JSON results: `python -m experiments.page`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from math import log10
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
PAGE = ROOT / "docs" / "results.md"
PLOT = ROOT / "docs" / "results-completeness.svg"

Result = dict[str, Any]

HEAD = """# Results

Every table is made by one command, with its seeds in the JSON file of the same name under `experiments/results/`;
`python -m experiments.page` writes this page from those files. The experiments are small enough for one CPU core and
a few minutes: the models have tens of thousands of parameters, so read the figures as statements about the
mathematics, not about large models.
"""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def by(rows: Sequence[Result], *names: str) -> dict[tuple[Any, ...], Result]:
    """Rows by the values of some columns."""
    return {tuple(row[name] for name in names): row for row in rows}


def order(rows: Sequence[Result], name: str) -> list[Any]:
    """The values of a column as they first appear."""
    return list(dict.fromkeys(row[name] for row in rows))


def brute_force(r: Result) -> str:
    """Errors by learning rate and path."""
    found, paths = by(r["table"], "optimizer", "lr", "path"), order(r["table"], "path")
    parts = [
        f"## One step against all subsets\n\n{r['model']}, one step after {r['warm_steps']}, batch of {r['samples']}; "
        f"mean over {len(r['seeds'])} seeds of the largest error of a sample's value over the largest value. Under "
        "AdamW what momentum carries and what decays are two more players. The last row is the order of the absolute "
        "error in the learning rate, fitted; below it, by how much the account misses the true change of the loss.\n"
    ]
    for kind, orders in r["orders"].items():
        rates = [lr for k, lr, p in found if k == kind and p == paths[0]]
        rows = [[lr, *(f"{found[kind, lr, p]['relative']:.1e}" for p in paths)] for lr in rates]
        rows.append(["order", *(f"{orders[p]:.2f}" for p in paths)])
        rows += [
            [f"unexplained at {lr}", *(f"{found[kind, lr, p]['unexplained']:.1e}" for p in paths)]
            for lr in rates
        ]
        parts.append(table([kind, *paths], rows))
    return "\n".join(parts)


def fidelity(r: Result) -> str:
    """RMSE and rank correlation."""
    found, paths = by(r["table"], "lr", "path"), order(r["table"], "path")
    rows = []
    for lr in order(r["table"], "lr"):
        one = found[lr, paths[0]]
        cells = [f"{found[lr, p]['rmse']:.1e} / {found[lr, p]['spearman']:.3f}" for p in paths]
        rows.append([lr, *cells, f"{one['size']:.1e}", f"{one['standard_error']:.1e}"])
    return (
        f"## A GPT step against Monte-Carlo Shapley\n\n{r['model']}; AdamW, batch of {r['samples']}, the step after "
        f"{r['warm_steps']} at that learning rate, {r['permutations']} permutations, seed {r['seed']}. "
        "RMSE in nats / Spearman. The last columns are the size of the values (root mean square) and the standard "
        "error of the ground truth itself, below which no RMSE can be told from zero.\n\n"
        + table(["learning rate", *paths, "size", "standard error"], rows)
    )


def adam(r: Result) -> str:
    """Correlations with what leaving a sample out really does."""
    found, scores = by(r["table"], "clip", "score", "truth"), order(r["table"], "score")
    rows = []
    for clip in order(r["table"], "clip"):
        for truth, words in (
            ("fixed", "K and clipping of the whole step"),
            ("anew", "optimizer and clipping run anew"),
        ):
            cells = []
            for s in scores:
                one = found[clip, s, truth]
                cells.append(f"{one['pearson']:.3f} / {one['pearson_inside']:.3f}")
            rows.append([clip or "none", words, *cells])
    factors = r["clip_factors"]
    return (
        f"## AdamW and clipping against leaving a sample out\n\n{r['model']}; AdamW, learning rate {r['lr']}, batch of "
        f"{r['samples']}, every {r['valued_every']}th of {r['steps']} steps, seed {r['seed']}; where clipping was on "
        f"it multiplied by {min(factors):.2f} to {max(factors):.2f}. The truth is by how much the loss is higher after "
        "the step without the sample, from the same state of the optimizer: once with K and the clipping factor as "
        "they were (the share of the update that is the sample's), once with the second moment and the clipping "
        "worked out anew (a path that values credit to nobody). Pearson over all samples of all these steps / "
        "inside a step, averaged. `dot` is the plain dot product of gradients.\n\n"
        + table(["clipping norm", "truth", *scores], rows)
    )


def completeness(r: Result) -> str:
    """Explained shares over the learning-rate sweep."""
    found, methods = by(r["table"], "lr", "method"), order(r["table"], "method")
    rows = []
    for lr in order(r["table"], "lr"):
        for target in next(iter(found.values()))["explained"]:
            shares = [f"{found[lr, m]['explained'][target]:.1%}" for m in methods]
            drop = found[lr, methods[0]]["lines"][target]["actual"]
            rows.append([lr, target, f"{drop:.3f}", *shares])
    cost = ", ".join(f"{found[lr, methods[-1]]['points']:.1f} at {lr}" for lr in order(r["table"], "lr"))
    return (
        f"## Whole runs: how much of the drop is explained\n\n{r['model']}; {r['training']}, seed {r['seed']}. "
        "Samples + carried + decayed over the measured drop, for two targets, by peak learning rate.\n\n"
        + table(["learning rate", "target", "drop (nats)", *methods], rows)
        + f"\nPoints per step that the tolerance asked for (at most 17): {cost}.\n\n"
        f"![Explained share by learning rate]({PLOT.name})\n"
    )


def demo(r: Result) -> str:
    """Explained shares of the demo's first steps."""
    found, paths = by(r["table"], "target", "path"), order(r["table"], "path")
    rows = [
        [t, f"{found[t, paths[0]]['drop']:.3f}", *(f"{found[t, p]['explained']:.1%}" for p in paths)]
        for t in order(r["table"], "target")
    ]
    return (
        f"## The demo's own training\n\nCut to its first steps, warm-up included: {r['training']}, seed {r['seed']}. "
        "Samples + carried + decayed over the measured drop.\n\n"
        + table(["target", "drop (nats)", *paths], rows)
    )


def momentum(r: Result) -> str:
    """The sketch beside the exact shares."""
    rows = [
        [
            row["momentum"],
            f"{row['spearman']:.3f}",
            f"{row['relative_rmse']:.3f}",
            f"{row['shared_out']:.1%}",
            f"{row['bytes'] / 2**20:.1f}",
        ]
        for row in r["table"]
    ]
    return (
        f"## Momentum shared out\n\n{r['model']} ({r['parameters']:,} parameters); {r['training']}, trapezoid, seed "
        f'{r["seed"]}. Values of every sample over the run against `momentum="exact"`; the share of what is carried '
        "(sum of absolute values over the steps) that samples were credited with; memory for the horizon. Position "
        "embeddings have no sketch and are kept as they are.\n\n"
        + table(["momentum", "Spearman", "relative RMSE", "shared out", "MiB"], rows)
    )


def duplicates(r: Result) -> str:
    """The worth of one copy."""
    found, paths = by(r["table"], "copies", "path"), order(r["table"], "path")
    rows = [[k, *(f"{found[k, p]['value']:.2e}" for p in paths)] for k in order(r["table"], "copies")]
    return (
        f"## A document planted k times\n\n{r['model']}; one SGD step (learning rate {r['lr']}) "
        f"after {r['warm_steps']} of AdamW, batch of {r['samples']} of which k are the same document, "
        f"seed {r['seed']}. Value of one copy in nats: the first order gives every copy the same, whatever k is.\n\n"
        + table(["k", *paths], rows)
    )


def second_moment(r: Result) -> str:
    """K with the second moment of the step before."""
    found = by(r["table"], "tied", "step")
    rows = [
        [
            step,
            *(
                f"{found[tied, step][column]:.2g}"
                for tied in (True, False)
                for column in ("largest_ratio", "relative_rmse")
            ),
        ]
        for step in order(r["table"], "step")
    ]
    return (
        f"## Adam's K with the second moment of the step before\n\n{r['model']}; AdamW, learning rate {r['lr']}, batch "
        f"of {r['samples']}, seed {r['seed']}. Largest ratio of the gain with v_{{t−1}} to the true one, and the error "
        "that it makes in the values relative to their size; with tied embeddings and without "
        "([decision 0003](decisions/0003-adam-uses-its-own-second-moment.md)).\n\n"
        + table(["step", "ratio, tied", "error, tied", "ratio, untied", "error, untied"], rows)
    )


SECTIONS: dict[str, Callable[[Result], str]] = {
    "brute_force": brute_force,
    "fidelity": fidelity,
    "adam": adam,
    "completeness": completeness,
    "demo": demo,
    "momentum": momentum,
    "duplicates": duplicates,
    "second_moment": second_moment,
}


def plot(r: Result) -> str:
    """The learning-rate sweep as SVG: |explained share − 1| of the worst target, both axes logarithmic."""
    methods, rates = order(r["table"], "method"), order(r["table"], "lr")
    found = by(r["table"], "lr", "method")
    low, high = -5, 2
    colours = ("#c0392b", "#d68910", "#1f618d", "#1e8449")

    def place(lr: float, miss: float) -> str:
        x = 70 + 460 * (log10(lr) - log10(rates[0])) / (log10(rates[-1]) - log10(rates[0]))
        y = 20 + 280 * (high - min(max(log10(max(miss, 1e-12)), low), high)) / (high - low)
        return f"{x:.1f},{y:.1f}"

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 350" font-family="sans-serif" font-size="12">',
        "<title>By how much the account misses the drop of the loss, by learning rate</title>",
        '<rect width="720" height="350" fill="white"/>',
    ]
    for power in range(low, high + 1):
        y = place(rates[0], 10.0**power).split(",")[1]
        parts.append(f'<line x1="70" x2="530" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="62" y="{float(y) + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for lr in rates:
        x = place(lr, 1).split(",")[0]
        parts.append(f'<text x="{x}" y="318" text-anchor="middle">{lr:g}</text>')
    parts.append('<text x="300" y="340" text-anchor="middle">peak learning rate</text>')
    parts.append(
        '<text x="14" y="160" text-anchor="middle" transform="rotate(-90 14 160)">|explained share − 1|</text>'
    )
    for n, (method, colour) in enumerate(zip(methods, colours, strict=True)):
        misses = [max(abs(1 - s) for s in found[lr, method]["explained"].values()) for lr in rates]
        points = " ".join(place(lr, miss) for lr, miss in zip(rates, misses, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(
            f'<line x1="545" x2="565" y1="{40 + 20 * n}" y2="{40 + 20 * n}" stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(f'<text x="570" y="{44 + 20 * n}">{method}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def page() -> tuple[str, str]:
    """The page and its plot, from the results."""
    results = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in SECTIONS}
    parts = [
        section(results[name])
        + f"\n`{results[name]['command']}` · torch {results[name]['torch']} · {results[name]['seconds']} s\n"
        for name, section in SECTIONS.items()
    ]
    return "\n".join([HEAD, *parts]), plot(results["completeness"])


if __name__ == "__main__":
    text, drawing = page()
    PAGE.write_text(text, encoding="utf-8")
    PLOT.write_text(drawing, encoding="utf-8")
