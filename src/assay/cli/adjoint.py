"""``assay adjoint``: the exact answer, by replaying a run backwards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay.cli.options import Debug, RunFolder
from assay.cli.output import check_out, write_out

if TYPE_CHECKING:
    import polars as pl

    from assay.replay import AdjointOptions

__all__ = ["adjoint"]


def adjoint(
    run: RunFolder,
    target: Annotated[
        list[str] | None, typer.Option("--target", "-t", help="A target of the run; may be repeated [all].")
    ] = None,
    last: Annotated[
        int | None, typer.Option("--last", min=1, help="Only the documents of the last so many steps.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Documents listed at each end.")] = 10,
    graphs: Annotated[
        str | None,
        typer.Option("--graphs", help="Memory for graphs that save a pass each, as '4 GB' [2 GB]."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="All values, .json, .csv or .parquet [default: RUN/adjoint.parquet]."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """What would each document's absence have done to the targets? Exact to first order, by replaying the run.

    For runs of `assay train` with `attribution.snapshots`. Positive: without the document the target's loss would be
    higher, in nats per token. Says too how well the cheaper methods agree with it on this run: its in-run values, its
    embeddings (`attribution.embeddings`) and influence functions (`assay serve RUN --build-index`); `assay report`
    shows that table. One that was killed goes on where it was.

    Example: assay adjoint runs/mine --target code
    """
    from rich.progress import Progress

    from assay.allocator import keep_freed_memory
    from assay.cli.progress import make_console
    from assay.replay import TABLE
    from assay.store import open_ledger
    from assay.train.agreement import cheaper_methods
    from assay.train.influence import keep_table
    from assay.train.replay import adjoint_of_run

    keep_freed_memory()
    ledger, console = open_ledger(run), make_console()
    where = out or run / "adjoint.parquet"
    check_out(where)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("replaying")

        def show(done: int, of: int) -> None:
            bar.update(task, completed=done, total=of)

        options: AdjointOptions = {"last": last, "progress": show}
        if graphs is not None:
            options["graphs"] = graphs
        values, documents, targets = adjoint_of_run(ledger, target or [], options)
    write_out(where, documents)
    for name in documents.columns[1:]:
        _print_ends(console, documents.select("id", value=name), name, top, ledger.metadata())
    others = cheaper_methods(ledger, targets, lambda line: console.print(f"note: {line}", highlight=False))
    table = ledger.agreement(values, others, list(targets))
    keep_table(ledger, TABLE, table)
    _print_agreement(console, table)
    console.print(f"\nall values: {where}", highlight=False, soft_wrap=True)


def _print_ends(console: Any, frame: pl.DataFrame, name: str, top: int, known: pl.DataFrame) -> None:
    console.print(f"\n{name}", highlight=False, markup=False)
    ranked = frame.sort("value", "id", descending=[True, False])
    count = min(top, len(ranked))
    for part in (ranked.head(count), ranked.tail(min(count, len(ranked) - count))):
        for row in part.join(known, on="id", how="left", maintain_order="left").iter_rows(named=True):
            text = " ".join(str(row.get("text") or "").split())[:60]
            line = f"{row['value']:+.3e}  {row['id']}  {text}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _print_agreement(console: Any, table: pl.DataFrame) -> None:
    console.print("\nrank correlation with the exact values, by step and by document", highlight=False)
    for row in table.iter_rows(named=True):
        by_step = "" if row["by_step"] is None else f"{row['by_step']:.3f}"
        line = f"{row['method']:<20} {row['query']:<20} {by_step:>7} {row['by_id']:>7.3f}"
        console.print(line, highlight=False, markup=False)
