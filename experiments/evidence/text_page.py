"""The evidence's sections on text: curation, composition, the paraphrase ladder, and what every method costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.evidence.shape import cell, section
from experiments.tables import Result, by, order, table

__all__ = ["PLOTS", "SECTIONS"]

PAPER = "arXiv 2406.11011"
COLOURS = (
    "#1f618d", "#c0392b", "#1e8449", "#d68910", "#7d3c98", "#148f77", "#5d6d7e", "#e67fb1", "#8e5b3a", "#2e86de",
    "#b7950b", "#566573", "#27ae60",
)  # fmt: skip


def model_of(s: dict[str, Any]) -> str:
    """The model in a few words."""
    return (
        f"GPT of {s['layers']} layers, width {s['width']}, a vocabulary of {s['vocabulary']:,} tokens learned from the "
        f"training text, context {s['context']}"
    )


def verdict(found: dict[str, Any], better: str, worse: str) -> str:
    """What a difference of losses says."""
    if found["low"] is None:
        return f"by {found['mean']:+.4f} nats in the one seed there is, from which nothing follows"
    text = f"by {found['mean']:+.4f} nats ({found['low']:+.4f} to {found['high']:+.4f})"
    if found["high"] < 0:
        return f"{text}: {better}"
    return f"{text}: {worse}" if found["low"] > 0 else f"{text}: the interval holds 0, no difference is shown"


def curation(r: Result) -> str:
    """Test losses and steps to the same loss, arm by arm."""
    s, rows = r["settings"], []
    for row in r["table"]:
        reached = cell(row["steps_to"], 2) if row["steps_to"] else "not reached"
        rows.append(
            [
                row["words"],
                cell(row["loss"], 3),
                cell(row["against_all"], 4) if row["arm"] != "all" else "",
                cell(row["against_random"], 4) if row["arm"] != "random" else "",
                cell(row["against_mixture"], 4) if row["arm"] != "same mixture" else "",
                reached + f" [{row['reached']} of {row['loss']['n']}]",
            ]
        )
    found = by(r["table"], "arm")
    negative, lowest = found["negative",], found["no warm-up",]
    tokens = negative["tokens_against_random"]
    reached = negative["steps_to"]
    steps = (
        "Without the negative documents the loss of all documents was not reached at all."
        if reached is None
        else f"Without the negative documents the loss of all documents came after {cell(reached, 2)} of the steps."
    )
    ways = r["ways"]
    findings = (
        f"*The paper* ({PAPER}): 16 % of its corpus negative, and without it the same loss in 25 % fewer steps; "
        f"controls were never published. *Here*: {cell(scaled(r['negative'], 100), 1)} % of the documents negative "
        f"(trapezoid, which explains {r['explained']['mean']:.1%} of the targets' loss drop). {steps} Dropping them "
        "beside dropping as many at random: "
        f"{verdict(negative['against_random'], 'better than random', 'worse than random')}; at the same number of "
        f"tokens {verdict(tokens, 'better than random', 'worse than random')}; beside as many at random of each "
        "domain, which keeps the mixture that the values choose: "
        f"{verdict(negative['against_mixture'], 'better', 'worse')}; beside all documents: "
        f"{verdict(negative['against_all'], 'better', 'worse')}. How much of a difference is chance: all documents in "
        f"another order, {verdict(found['other order',]['against_all'], 'lower', 'higher')}. Every arm takes the "
        "same number of steps, so that those with fewer documents see each more often.\n\nHow noisy is a value? "
        f"Those of the first pass and those of the second correlate with {cell(r['passes'], 2)} (Spearman). One "
        f"hundredth of the documents holds {r['top_hundredth']['mean']:.0%} of the absolute value: Adam's first "
        "steps, whose gain is lr / (|g| + ε), move the loss most whatever they are fed. Without the warm-up's "
        f"values the order correlates with {ways['no warm-up']['spearman']:.2f}, and "
        f"{ways['no warm-up']['same_dropped']:.0%} of the dropped documents are the same; with every step weighing "
        f"the same {ways['even steps']['spearman']:.2f} and {ways['even steps']['same_dropped']:.0%}. A mean per "
        "visit in place of the sum has the same signs, as every document is seen equally often. Trained without "
        "the lowest values of those after the warm-up, beside random: "
        f"{verdict(lowest['against_random'], 'better than random', 'worse than random')}."
    )
    what = (
        f"{model_of(s)}; {s['documents']} documents of each of the 13 domains of the mini-Pile, the first tokens of "
        f"each, {s['passes']} passes in batches of {s['batch']}, AdamW {s['learning_rate']}, warm-up and cosine. "
        f"Each is valued in the run ({s['path']}) for {s['target_documents']} held-out documents of every domain; "
        "all arms leave out as many as have a negative value, start from the same weights, meet what is left in "
        f"the same order and are judged on {s['test_documents']} other documents of every domain. Loss in nats per "
        "token; a negative difference is a lower loss. *Steps*: to the final loss of all documents, as a share of "
        "its steps, and in how many seeds it was reached."
    )
    head = ["trained", "test loss", "against all", "against random", "against same mixture", "steps"]
    return section(
        r,
        "Curation: is dropping the negative values better than dropping at random?",
        what,
        head,
        rows,
        findings,
    )


def scaled(found: dict[str, Any], by: float) -> dict[str, Any]:
    """An estimate in another unit."""
    return {key: value if value is None or key == "n" else value * by for key, value in found.items()}


def composition(r: Result) -> str:
    """Negative shares of the domains, and what rises and falls."""
    s = r["settings"]
    rows = [
        [
            row["domain"],
            *(cell(scaled(row[name], 100), 1) for name in ("mixture", "own", "others")),
        ]
        for row in sorted(r["table"], key=lambda row: -row["mixture"]["mean"])
    ]
    moves = []
    sure = 0
    for target in order(r["moves"], "target"):
        own = sorted(
            (row for row in r["moves"] if row["target"] == target), key=lambda row: row["change"]["mean"]
        )
        sure += sum(
            row["change"]["low"] is not None and row["change"]["low"] * row["change"]["high"] > 0
            for row in own
        )
        falls, rises = own[0], own[-1]
        same = next((row for row in own if row["domain"] == target), None)
        moves.append(
            [
                target,
                "" if same is None else f"{same['early']:.0%} → {same['late']:.0%}",
                f"{rises['domain']}, {rises['early']:.0%} → {rises['late']:.0%}",
                f"{falls['domain']}, {falls['early']:.0%} → {falls['late']:.0%}",
            ]
        )
    same = [row for row in r["moves"] if row["target"] == row["domain"]]
    grown = sum(row["late"] > row["early"] for row in same)
    findings = (
        "What rises and what falls: of all that the documents of a window of the run did for a target, the share of a "
        "domain (equally many documents of each, so that an even share is 8 %), in the first third of the run and "
        "in the last. Means over the seeds; a share above 100 % stands against domains that raised the loss.\n\n"
        + table(["target", "the target's own domain", "rises most", "falls most"], moves)
        + f"\n{grown} of {len(same)} targets have a larger share from their own domain at the end than at first. Of "
        f"the {len(r['moves'])} changes {sure} have an interval over the seeds that leaves out 0. *The paper* "
        f"({PAPER}) shows shares over the steps as a figure, without numbers to set beside these.\n\n"
        "![Share of each domain by target and step](results-composition.svg)"
    )
    what = (
        f"The runs of the section before ({s['windows']} windows of {r['steps']} steps). Documents with a negative "
        "value, in percent: for the mean of all targets, for the target of their own domain, and for the mean of "
        "the other twelve."
    )
    head = ["domain", "negative for all", "for its own domain", "for the others"]
    return section(r, "Composition: whose value, for whom, when?", what, head, rows, findings)


def composition_plot(r: Result) -> str:
    """Shares of the domains over the steps, a panel for each of four targets, as SVG."""
    found = by(r["composition"], "target", "domain")
    domains = order(r["composition"], "domain")
    low, high = -0.2, 1.0
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 560" font-family="sans-serif" font-size="11">',
        "<title>Share of each domain in what a window of the training did for a target</title>",
        '<rect width="760" height="560" fill="white"/>',
    ]
    for n, target in enumerate(order(r["composition"], "target")):
        left, top = 46 + 300 * (n % 2), 30 + 260 * (n // 2)
        parts.append(f'<text x="{left}" y="{top - 8}" font-weight="bold">for {target}</text>')
        for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
            y = top + 200 * (high - tick) / (high - low)
            parts.append(f'<line x1="{left}" x2="{left + 250}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
            parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{tick:.0%}</text>')
        for domain, colour in zip(domains, COLOURS, strict=True):
            share = found[target, domain]["share"]
            points = " ".join(
                f"{left + 250 * (k + 0.5) / len(share):.1f},"
                f"{top + 200 * (high - min(max(v, low), high)) / (high - low):.1f}"
                for k, v in enumerate(share)
            )
            width = 2.5 if domain == target else 1.2
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"/>'
            )
        parts.append(
            f'<text x="{left + 125}" y="{top + 218}" text-anchor="middle">step 0 to {r["steps"]}</text>'
        )
    for n, (domain, colour) in enumerate(zip(domains, COLOURS, strict=True)):
        y = 40 + 20 * n
        parts.append(f'<line x1="640" x2="658" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="663" y="{y + 4}">{domain}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def ladder(r: Result) -> str:
    """Mean ranks by method and rung."""
    s, found = r["settings"], by(r["table"], "method", "rung")
    rungs, methods = order(r["table"], "rung"), order(r["table"], "method")
    best = {rung: min(found[m, rung]["rank"]["mean"] for m in methods) for rung in rungs}
    rows = [
        [
            method,
            *(
                cell(found[method, rung]["rank"], 1, found[method, rung]["rank"]["mean"] == best[rung])
                for rung in rungs
            ),
            " / ".join(f"{found[method, rung]['recall10']['mean']:.0%}" for rung in rungs),
        ]
        for method in methods
    ]
    trapezoid, even, first, hessian, logra, bm25, sentences = (
        {rung: found[method, rung]["rank"]["mean"] for rung in rungs}
        for method in (
            "in-run, second order, trapezoid", "in-run, second order, trapezoid, every step alike",
            "in-run, first order", "in-run, second order, Hessian", "influence (LoGra)", "BM25", "sentence similarity",
        )
    )  # fmt: skip
    gap = max(abs(trapezoid[rung] - first[rung]) for rung in rungs)
    gap = max(gap, *(abs(hessian[rung] - trapezoid[rung]) for rung in rungs))
    winner = min(methods, key=lambda m: found[m, "heavy"]["rank"]["mean"])
    findings = (
        f"*The paper* ({PAPER}; GPT-2 on the Pile, three groups): in-run 1 (verbatim and light), 32 (heavy), 142 (same "
        f"topic); BM25 1, 1.6, 20,917. *Here* {reproduced(trapezoid)}: in-run "
        f"(trapezoid) {trapezoid['verbatim']:.1f}, {trapezoid['light']:.1f}, {trapezoid['heavy']:.1f} and "
        f"{trapezoid['same topic']:.1f} of {r['documents']} documents, BM25 {bm25['verbatim']:.1f}, "
        f"{bm25['light']:.1f}, {bm25['heavy']:.1f} and {bm25['same topic']:.1f}. The corpus is smaller by orders of "
        "magnitude, the paraphrases are translations of one verse, and a neighbour shares names and style with it: "
        f"figures compare within the table only. First and second order differ by at most {gap:.1f} ranks. At the "
        f"heavy rung {winner} is ahead with {found[winner, 'heavy']['rank']['mean']:.1f}; LoGra has "
        f"{logra['heavy']:.1f}, sentence similarity {sentences['heavy']:.1f}. In-run values say what a document did "
        "to the query's loss, and a document did more at a step of a high learning rate, whatever it says; *every "
        f"step alike* divides that out (each value over the mean size of its step's): {even['verbatim']:.1f}, "
        f"{even['light']:.1f}, {even['heavy']:.1f} and {even['same topic']:.1f}."
    )
    per = {rung: found[methods[0], rung]["queries"] for rung in rungs}
    what = (
        f"{model_of(s)}, {s['passes']} passes over {r['documents']} documents in batches of {s['batch']}, AdamW "
        f"{s['learning_rate']}. Among them verses of the King James Bible; asked with the verse itself, with the World "
        f"English Bible's (light: at least {s['light']:.0%} of the words of both in common; heavy: at most "
        f"{s['heavy']:.0%}), and with the verse that follows it, not trained on, in the other translation. Mean "
        "rank of the original among all documents (1 is best), in brackets 95 % bootstrap intervals over the queries "
        f"({', '.join(f'{n} {rung}' for rung, n in per.items())}); then recall at 10, rung by rung. Over"
    )
    head = ["method", *rungs, "recall@10"]
    return one_interval(section(r, "The paraphrase ladder", what, head, rows, findings))


def one_interval(text: str) -> str:
    """Without the sentence on intervals over seeds, where they are over queries."""
    return text.replace("; in brackets 95 % intervals of the mean over the seeds (Student's t)", "")


def reproduced(rank: dict[str, float]) -> str:
    """Whether the ranks go up the ladder."""
    values = list(rank.values())
    up = "the ranks go up the same ladder"
    return up if values == sorted(values) else "the ranks do not go up the ladder rung by rung"


def milliseconds(one: dict[str, float] | None) -> str:
    """What one more costs with the range of it, or what it costs less than, where that is all the rounds say."""
    if one is None:
        return ""
    if one["high"] <= 0:
        return "below noise"
    mean, low, high = (f"{float(f'{1000 * one[name]:.2g}'):,.10g}" for name in ("seconds", "low", "high"))
    return f"{mean} ({low} to {high})" if one["low"] > 0 else f"< {high}"


def cost(r: Result) -> str:
    """Seconds and memory beyond a training."""
    s, rows = r["settings"], []
    for row in r["table"]:
        if "reason" in row:
            rows.append([row["method"], row["reason"], "", "", "", ""])
            continue
        slopes = [milliseconds(row.get(f"one_of_{work}")) for work in ("documents", "queries")]
        rows.append(
            [
                row["method"],
                "training" if row["watches"] else "the model",
                f"{row['seconds']:.2f}",
                f"{row['seconds'] / row['plain']:.2f}",
                f"{row['memory']:.0f}",
                *slopes,
            ]
        )
    found = by(r["table"], "method")
    text = []
    for name, paper in (("left", "1.08"), ("hessian", "2.22")):
        row = found.get((f"in-run, {name}, one target",))
        if row and "seconds" in row:
            text.append(
                f"{'first' if name == 'left' else 'second'} order {1 + row['seconds'] / row['plain']:.2f}× here, "
                f"{paper}× there"
            )
    loo = s["documents"] * r["plain"]
    findings = (
        f"Retraining without each document in turn, for comparison: {s['documents']} × {r['plain']:.2f} s = "
        f"{loo:,.0f} s. *The paper* ({PAPER}; GPT-2 small on an A100, samples/s 76.2 plain, 70.5 first order, 34.4 "
        f"second): {'; '.join(text)}. This model is hundreds of times smaller, its batch is small, and the target's "
        "own pass is a large part of a step. What a step costs on larger models: `python benchmarks/overhead.py`. "
        "LoGra's and the embeddings' figures in their papers (A100, billions of tokens) have no counterpart here."
    )
    what = (
        f"{model_of(s)}; {s['documents']} documents, {s['passes']} passes in batches of {s['batch']}; {s['queries']} "
        "queries, one score for each, or one for all together (*one target*). Each method in a process of its own, one "
        f"thread, median of {s['rounds']} rounds. Seconds of the processor, *beyond* training for methods that "
        "watch one, and beyond a trained model for the others; their share of the training; the peak of memory "
        "beyond what the process held (MiB); milliseconds for one more document and one more query, from "
        f"{s['more_documents']} times the documents and {s['more_queries']} times the queries, in brackets the least "
        "and the most that any two of the rounds say, and a bound where that holds 0. A training takes "
        f"{r['plain']:.2f} s."
    )
    head = ["method", "watches", "seconds", "of a training", "MiB", "ms / document", "ms / query"]
    return section(r, "What every method costs", what, head, rows, findings)


SECTIONS: dict[str, Callable[[Result], str]] = {
    "curation": curation,
    "composition": composition,
    "ladder": ladder,
    "cost": cost,
}
PLOTS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "results-composition.svg": ("composition", composition_plot)
}
