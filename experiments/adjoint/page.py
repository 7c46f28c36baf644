"""Sections of `docs/results.md` on the adjoint."""

from __future__ import annotations

from collections.abc import Callable

from experiments.tables import Result, by, order, table


def digits(r: Result) -> str:
    """Spearman by optimizer and method."""
    found, methods = by(r["table"], "optimizer", "method"), order(r["table"], "method")
    rows = [
        [name, *(f"{found[name, m]['spearman']:.3f}" for m in methods)]
        for name in order(r["table"], "optimizer")
    ]
    return (
        f"## The adjoint against honest retraining: digits\n\n{r['model']}; {r['data']}. One sample's term out of one "
        f"step, {r['removals']} random removals × {r['queries']} queries, seed {r['seed']}; Spearman with the true "
        "change of each query's loss after training again, averaged over the queries. The dot product is that of "
        "gradients at the final weights.\n\n" + table(["optimizer", *methods], rows)
    )


def gpt(r: Result) -> str:
    """Spearman by method."""
    methods = order(r["table"], "method")
    found = by(r["table"], "method")
    return (
        f"## The adjoint against honest retraining: a GPT with AdamW and clipping\n\n{r['model']}; {r['training']}. "
        f"One row's term out of one step, {r['removals']} random removals × {r['queries']} queries, seed {r['seed']}; "
        "Spearman with the truth, averaged over the queries.\n\n"
        + table(methods, [[f"{found[(m,)]['spearman']:.3f}" for m in methods]])
    )


def groups(r: Result) -> str:
    """LDS by model, method and share."""
    parts = [
        f"## Groups left out of the whole run\n\nLinear datamodeling score on the same seed and order: rank "
        f"correlation, over {r['groups']} random groups, of the summed values of their samples with the true effect "
        "of leaving the group out of every step; mean over the queries (the lowest query in brackets), "
        f"seed {r['seed']}. {'; '.join(f'{k}: {v}' for k, v in r['models'].items())}. MAGIC reports {r['magic']} for "
        "GPT-2 on WikiText (arXiv 2504.16430, in bergson's list): another model and another task, so that the figures "
        "say no more than that both are of one kind.\n"
    ]
    for model in order(r["table"], "model"):
        own = [row for row in r["table"] if row["model"] == model]
        found = by(own, "method", "share")
        rows = [
            [m, *(f"{found[m, s]['lds']:.3f} ({found[m, s]['lowest']:.2f})" for s in r["shares"])]
            for m in order(own, "method")
        ]
        parts.append(table([model, *(f"groups of {share:.0%}" for share in r["shares"])], rows))
    return "\n".join(parts)


SECTIONS: dict[str, Callable[[Result], str]] = {
    "adjoint_mnist": digits,
    "adjoint_gpt": gpt,
    "adjoint_lds": groups,
}
PLOTS: dict[str, tuple[str, Callable[[Result], str]]] = {}
