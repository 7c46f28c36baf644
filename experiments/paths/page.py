"""Sections of `docs/results.md` on the paths of in-run values."""

from __future__ import annotations

from collections.abc import Callable
from math import log10

from experiments.tables import Result, by, order, table


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
    least = {s: min(found[clip, s, "fixed"]["pearson"] for clip in order(r["table"], "clip")) for s in scores}
    high = ", ".join(f"{s} ({x:.3f})" for s, x in least.items() if x >= 0.99)
    low = ", ".join(f"{s} ({x:.3f})" for s, x in least.items() if x < 0.99)
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
        + f"\nAt least 0.99 against the share of the update, with clipping and without: {high}; below it: {low}. The "
        "truth is a loss at the end of the step, and the left end knows the gradient at its beginning only.\n"
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
        f"![Explained share by learning rate](results-completeness.svg)\n"
    )


def demo(r: Result) -> str:
    """Explained shares of the demo's first steps."""
    found, methods = by(r["table"], "target", "method"), order(r["table"], "method")
    shown = [m for m in methods if "sketch" not in m]
    rows = [
        [t, f"{found[t, shown[0]]['drop']:.3f}", *(f"{found[t, m]['explained']:.1%}" for m in shown)]
        for t in order(r["table"], "target")
    ]
    shared = ", ".join(f"{share:.1%} ({target})" for target, share in r["shared_out"].items())
    points = max(row["points"] for row in r["table"] if row["method"] == shown[-1])
    return (
        f"## The demo's own training\n\nCut to its first steps, warm-up included: {r['training']}, seed {r['seed']}. "
        "Samples + carried + decayed over the measured drop.\n\n"
        + table(["target", "drop (nats)", *shown], rows)
        + f"\nThe tolerance asked for {points:.1f} points per step. The same run by the trapezoid with "
        f'`momentum="sketch"`: of the carried line (sum of absolute values over the steps) {shared} went to samples, '
        f"with {r['sketch_bytes'] / 2**20:.0f} MiB of sketches at most.\n"
    )


def demo_whole(r: Result) -> str:
    """Explained shares of the demo, from its first step to its last."""
    found, methods = by(r["table"], "target", "method"), order(r["table"], "method")
    rows = [
        [t, f"{found[t, methods[0]]['drop']:.3f}", *(f"{found[t, m]['explained']:.1%}" for m in methods)]
        for t in order(r["table"], "target")
    ]
    points = max(row["points"] for row in r["table"] if row["method"] == methods[-1])
    return (
        f"## The demo's whole training\n\n{r['training'][0].upper()}{r['training'][1:]}, seed {r['seed']}. Samples + "
        "carried + decayed over the measured drop.\n\n"
        + table(["target", "drop (nats)", *methods], rows)
        + f"\nThe tolerance asked for {points:.1f} points per step.\n"
    )


def reduced(r: Result) -> str:
    """Errors of the rounded correction."""
    rows = [
        [
            row["optimizer"],
            row["way"],
            *(f"{row[k]:.1e}" for k in ("rmse", "worst", "worst_total")),
            f"{row['spearman']:.4f}",
        ]
        for row in r["table"]
    ]
    return (
        f"## The trapezoid with less memory\n\n{r['model']}; {r['training']}, seed {r['seed']}. Errors of the single "
        'values (root mean square, largest) and of a step\'s total (largest) against `memory="keep"`, all over the '
        "root mean square of the values. `reduced`: the left end exact, the correction from gradients in bfloat16, its "
        "total exact. `recompute` has no error of its own: what it shows is training itself, which without kept "
        "gradients adds up the weight gradient in another order, a last digit that Adam magnifies where v is small. "
        "`left`: no correction at all.\n\n"
        + table(["optimizer", "memory", "RMSE", "largest", "largest, step total", "Spearman"], rows)
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
    "demo_whole": demo_whole,
    "reduced": reduced,
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


PLOTS = {"results-completeness.svg": ("completeness", plot)}
