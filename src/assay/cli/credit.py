"""``assay credit``: what each source contributed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli.options import Debug, RunFolder, Targets
from assay.cli.output import check_out, plain, write_out

if TYPE_CHECKING:
    from assay.acting import Credit

__all__ = ["credit"]


def credit(
    run: RunFolder,
    by: Annotated[str, typer.Option("--by", help="Metadata column that names the source.")],
    target: Targets = None,
    level: Annotated[float, typer.Option("--level", help="Of the interval.")] = 0.95,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Also write it: .json (with how it was made), .csv, .parquet."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Share the explained improvement of a target out to the sources of the samples, with intervals.

    A share is the sum of a source's values over the sum of all values. The interval is a bootstrap over samples;
    another seed or order of the training would move the shares as well.

    Example: assay credit runs/demo --by source --target python_code
    """
    import assay
    from assay.acting import credit as share_out

    check_out(out)
    shares = share_out(assay.open(run), by, target, level=level)
    for line in shares.statement["caution"]:
        typer.echo(f"caution: {line}", err=True)
    _print(shares, by)
    if out is not None:
        write_out(out, shares.table, shares.statement)
        typer.echo(out)


def _print(shares: Credit, by: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from assay.cli.progress import make_console, named_share

    console, statement = make_console(), shares.statement
    targets = ", ".join(statement["targets"])
    table = Table(title=f"Share of the explained improvement of {targets}, by {by}", title_justify="left")
    for name in (by, "samples", "value", "share", f"{statement['interval']['level']:.0%} interval"):
        table.add_column(name, justify="left" if name == by else "right")
    for source, samples, value, share, low, high in shares.table.iter_rows():
        interval = f"{named_share(low)} … {named_share(high)}"
        shown = Text("(none)" if source is None else plain(source))
        table.add_row(shown, f"{samples:,}", f"{value:+.4g}", named_share(share), interval)
    console.print(table)
    explained = "; ".join(f"{name} {named_share(share)}" for name, share in statement["explained"].items())
    covered = ", ".join(
        f"{status} {named_share(share)}" for status, share in (statement["coverage"] or {}).items()
    )
    for line in (
        f"Method: {_method(statement['methods'])}.",
        f"The account explains, of the real loss drop: {explained}. Parameters: {covered or 'not recorded'}.",
        f"Share: {statement['share']}. Interval: {statement['interval']['method']}.",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def _method(methods: list[dict[str, object]]) -> str:
    settings = methods[0] if methods else {"method": "unknown"}
    return ", ".join(
        str(value) if name == "method" else f"{name} {value}" for name, value in settings.items()
    )
