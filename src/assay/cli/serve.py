"""``assay serve``: a local explorer of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.cli.options import Debug, RunFolder
from assay.errors import InputError

__all__ = ["serve"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    run: RunFolder,
    index: Annotated[Path | None, typer.Option("--index", help="Index [default: RUN/index].")] = None,
    build_index: Annotated[
        bool, typer.Option("--build-index", help="Index the run's documents first, if that is not done.")
    ] = False,
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen at.")] = 8765,
    debug: Debug = False,
) -> None:
    """Look at a run in a browser: paste a text, see which training documents stand behind it.

    Listens on this machine only, unless --host says otherwise. Stop it by Ctrl-C.

    Example: assay serve runs/demo --build-index
    """
    import assay

    try:
        import uvicorn

        from assay.serve import make_app, make_searcher
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'assay[serve]'") from error
    ledger = assay.open(run)
    searcher = make_searcher(ledger, index, build_index, progress=_indexed)
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")
    if host not in LOOPBACK:
        typer.echo(f"caution: {host} can be reached by other machines, and there is no password", err=True)
        hosts = ("*",)
    app = make_app(ledger, searcher, hosts)
    typer.echo(f"http://{f'[{host}]' if ':' in host else host}:{port}/ shows {run}; Ctrl-C ends it")
    if searcher is None:
        typer.echo("no index: texts can be looked for by words only; --build-index makes one", err=True)
    try:
        uvicorn.run(app, host=host, port=port, log_level="warning")
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except SystemExit as error:  # uvicorn has said why on its log
        raise InputError(
            f"cannot listen at {host}, port {port}: is it taken? Choose another --port"
        ) from error


def _indexed(rows: int) -> None:
    if rows % 512 == 0:
        typer.echo(f"indexed {rows:,} rows", err=True)
