"""Sections on flipped labels, on closeness to the definitions, and on groups and best examples left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from experiments.evidence.shape import cell, section
from experiments.tables import Result, by, order

__all__ = ["SECTIONS"]

CIFAR = {
    "KNN-Shapley": (0.760, (0.354, 0.478, 0.525, 0.563)),
    "in-run, hessian": (0.680, None),
    "in-run, left": (0.678, (0.344, 0.472, 0.541, 0.580)),
    "EKFAC": (0.654, None),
    "TRAK": (0.617, None),
    "retraining Shapley": (0.582, None),
    "random": (None, (0.350, 0.461, 0.525, 0.559)),
}
"""AUROC and accuracies of Wang et al. on CIFAR-10; their influence function stands beside EKFAC, "
"their TRAK took 25 models."""


def known(method: str, which: int) -> str:
    """The paper's figure, or a dash."""
    found = CIFAR.get(method, (None, None))[which]
    if found is None:
        return "–"
    return f"{found:.3f}" if isinstance(found, float) else " / ".join(f"{x:.3f}".lstrip("0") for x in found)


def mislabels(r: Result) -> str:
    """Detection and selection by data set."""
    s, shares = r["settings"], r["settings"]["shares"]
    parts = []
    for name, found in r["tables"].items():
        rows = sorted(found["rows"], key=lambda row: -row["auroc"]["mean"])
        best = [max(row["accuracy"][i]["mean"] for row in rows) for i in range(len(shares))]
        cells = [
            [
                row["method"],
                cell(row["auroc"], best=row is rows[0]),
                f"{row['auprc']['mean']:.3f}",
                *(cell(a, best=a["mean"] == best[i]) for i, a in enumerate(row["accuracy"])),
                known(row["method"], 0),
                known(row["method"], 1),
                f"{row['seconds']:.1f}",
            ]
            for row in rows
        ]
        what = (
            f"{s['examples']:,} real images of {name}, {s['flipped']:.0%} of the labels flipped; "
            f"784-{s['width']}-10 tanh "
            f"network, SGD {s['rate']}, {s['epochs']} epochs of batches of {s['batch']}. Values are taken for "
            f"{s['validation']} clean images; the lowest are held to be flipped (AUROC, and AUPRC, "
            "where chance is "
            f"{s['flipped']:.2f}). Then a new network is trained on the best "
            f"{', '.join(f'{x:.0%}' for x in shares)}: its "
            f"accuracy on {s['test']:,} other images, which is {cell(found['everything'])} with everything and "
            f"{cell(found['clean'])} without the flipped ones. The paper's figures are of CIFAR-10 and "
            "another network: "
            "their order can be compared, not their size. Seconds: of the scores, of which what "
            "watches the training trains "
            "once."
        )
        head = ["method", "AUROC", "AUPRC", *(f"best {x:.0%}" for x in shares)]
        head += ["paper, AUROC", "paper, 20/40/60/80 %", "seconds"]
        parts.append(section(r, f"Flipped labels: {name}", what, head, cells, told(rows)))
    return "\n".join(parts)


def told(rows: Sequence[Any]) -> str:
    """What the table says of the paper's order."""
    found = {row["method"]: row["auroc"]["mean"] for row in rows}
    own = {name: found[name] for name in found if name.startswith(("in-run", "embeddings", "adjoint"))}
    best = max(own, key=lambda name: own[name])
    first = rows[0]["method"]
    simple = [name for name in found if name not in own and found[name] > own[best]]
    text = f"The best here is {first} ({found[first]:.3f}); of the methods that follow the training it is "
    text += f"{best} ({own[best]:.3f})."
    if simple:
        text += f" Cheaper or simpler, and better at this: {', '.join(simple)}."
    paper = ["KNN-Shapley", "in-run, hessian", "in-run, left", "TRAK", "retraining Shapley"]
    ours = sorted((name for name in paper if name in found), key=lambda name: -found[name])
    same = ours == [name for name in paper if name in found]
    text += (
        " The paper's order ("
        + ", ".join(paper)
        + ") is "
        + ("ours too." if same else "not ours: " + ", ".join(ours) + ".")
    )
    return text


def fidelity(r: Result) -> str:
    """Paths against Shapley values of a step, and methods against leaving out a term of a step."""
    s = r["settings"]
    found = by(r["steps"], "lr", "path")
    rows = [
        [
            f"{lr:g}",
            path,
            f"{row['rmse']['mean']:.2e}",
            cell(row["spearman"], 4),
            f"{row['size']['mean']:.2e}",
        ]
        for (lr, path), row in found.items()
    ]
    first = section(
        r,
        "Fidelity of in-run values, over seeds",
        f"One AdamW step of the tiny GPT after 100 others, 16 samples, against Shapley values of "
        f"{s['permutations']} "
        "permutations; size is the root mean square of the true values. The paper, for GPT-2 and its "
        "first order against 1,000 "
        "permutations: RMSE 0.0003 at 3e-4, 0.0012 at 6e-4 (Spearman 0.99), 0.0017 at 5e-3 (0.79).",
        ["learning rate", "path", "RMSE", "Spearman", "size"],
        rows,
    )
    methods = order([{"m": m} for own in r["runs"].values() for m in own], "m")
    lines = [[name, *(cell(own[m]) if m in own else "–" for m in methods)] for name, own in r["runs"].items()]
    second = section(
        r,
        "Fidelity of embeddings, over seeds",
        f"A perceptron on 1,000 digits, 4 epochs; one sample's term out of one step, {s['removals']} "
        "random removals × "
        f"{s['queries']} queries; Spearman with honest retraining, the mean over the queries. "
        "Embeddings of rank "
        f"{s['rank']} on principal axes, one block. The paper's figure shows 0.9 and more for SGD on MNIST.",
        ["run", *methods],
        lines,
    )
    return first + "\n" + second


def effects(r: Result) -> str:
    """LDS and brittleness by model."""
    s, parts = r["settings"], []
    models = {
        "MNIST-MLP": f"784-{s['width']}-10 tanh network, SGD 0.1",
        "tiny GPT": "GPT of 2 layers of width 32 on bytes, AdamW 3e-3",
    }
    for i, (name, rows) in enumerate(r["tables"].items()):
        rows = sorted(rows, key=lambda row: -row["lds"]["mean"])
        counts = s["counts"][i]
        flips = rows[0]["flipped"] is not None
        head = ["method", "LDS", *(f"rise, {k} out" for k in counts)]
        head += [f"flipped, {k} out" for k in counts] if flips else []
        cells = [
            [
                row["method"],
                cell(row["lds"], best=row is rows[0]),
                *(cell(x) for x in row["rise"]),
                *([f"{x['mean']:.2f}" for x in row["flipped"]] if flips else []),
                f"{row['seconds']:.1f}",
            ]
            for row in rows
        ]
        what = (
            f"{models[name]}, {s['examples'][i]:,} examples, {s['epochs'][i]} epochs of batches of "
            f"{s['batch'][i]}. LDS: "
            f"rank correlation with the losses of {s['queries'][i]} queries after training on "
            f"{s['subsets'][i]} random halves, "
            f"each with {s['retrained'][i]} other seeds. Brittleness: the "
            f"{' or '.join(map(str, counts))} best examples of each "
            f"of {s['asked'][i]} queries are taken away and the network is trained again from the same "
            "start; rise of its loss "
            "in nats"
            + (", and how often a right answer turned wrong" if flips else "")
            + ". Intervals are 95 % bootstrap "
            "intervals over the queries, of means over the seeds of the training that is valued."
        )
        title = f"Groups and best examples left out, every method: {name}"
        parts.append(section(r, title, what, [*head, "seconds"], cells, interval=False))
    return "\n".join(parts)


SECTIONS: dict[str, Callable[[Result], str]] = {
    "mislabels": mislabels,
    "fidelity_seeds": fidelity,
    "effects": effects,
}
