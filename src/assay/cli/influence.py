"""``assay influence``: which documents stand behind a text, and when in training they did."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.cli.options import Debug
from assay.cli.output import check_out, write_out
from assay.errors import InputError

__all__ = ["influence"]


def influence(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run with --embeddings.")],
    query: Annotated[
        list[str],
        typer.Option("--query", "-q", metavar="TEXT|FILE", help="A text, or a file of it; may be repeated."),
    ],
    top: Annotated[int, typer.Option("--top", min=1, help="Documents listed at each end.")] = 10,
    segments: Annotated[int, typer.Option("--segments", min=1, help="Parts into which the run is cut.")] = 1,
    curvature: Annotated[
        str, typer.Option("--curvature", help="fisher, or ggn if it was recorded.")
    ] = "fisher",
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that build.")] = 1,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write all influences to this .json, .csv or .parquet.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Which documents stand behind a text: what if each had been left out of training?

    Positive: without the document the text's loss would be higher, in nats per token. The curves of influence by
    step are kept with the run and shown by `assay report`.

    Example: assay influence runs/mine --query "The court finds that" --top 5
    """
    from assay.cli.progress import make_console
    from assay.store import open_ledger
    from assay.train.influence import influence_of_texts, keep_curves

    check_out(out)
    ledger, console = open_ledger(run), make_console()
    texts = {_name(n, given): _text(given) for n, given in enumerate(query)}
    found = influence_of_texts(ledger, texts, segments, curvature, workers)  # type: ignore[arg-type]
    keep_curves(ledger, found.curves)
    if out is not None:
        write_out(out, found.documents)
    known = ledger.metadata()
    for name in texts:
        own = found.documents.filter(query=name)
        console.print(f"\n{name}", highlight=False, markup=False)
        count = min(top, len(own))
        for part in (own.head(count), own.tail(min(count, len(own) - count))):
            for row in part.join(known, on="id", how="left", maintain_order="left").iter_rows(named=True):
                text = " ".join(str(row.get("text") or "").split())[:60]
                console.print(
                    f"{row['influence']:+.3e}  {row['id']}  {text}",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )


def _text(given: str) -> str:
    """The content of a file of that name, or the words themselves."""
    try:
        return Path(given).read_text(encoding="utf-8") if Path(given).is_file() else given
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and not Path(given[:255]).exists():
            return given  # too long for the name of a file
        raise InputError(
            f"--query {given}: the file cannot be read as text ({error}): save it as UTF-8"
        ) from error


def _name(number: int, given: str) -> str:
    short = given if len(given) <= 40 else given[:37] + "..."
    return f"{number + 1}: {short}"
