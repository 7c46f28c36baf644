"""``assay search``: which documents of an index stand behind a text."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli.options import Debug
from assay.cli.output import check_out, write_out
from assay.errors import InputError

if TYPE_CHECKING:
    import polars as pl

__all__ = ["search"]


def search(
    index: Annotated[Path, typer.Argument(metavar="INDEX", help="Folder of an index.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model that was indexed.")],
    query: Annotated[
        list[str] | None,
        typer.Option("--query", "-q", metavar="TEXT|FILE", help="A text, or a file of it; may be repeated."),
    ] = None,
    top: Annotated[int, typer.Option("--top", "-k", min=1, help="Documents per query.")] = 10,
    damping: Annotated[float, typer.Option("--damping", help="In mean eigenvalues of each layer.")] = 0.1,
    curvature: Annotated[
        str, typer.Option("--curvature", help="fisher, ekfac, kfac or identity.")
    ] = "fisher",
    normalize: Annotated[
        str | None, typer.Option("--normalize", help="relatif or unit [default: none].")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of a query that count.")] = 256,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps.")] = "cpu",
    data: Annotated[Path | None, typer.Option("--data", help="The documents, to show their texts.")] = None,
    text: Annotated[str, typer.Option("--text", help="Column of the text in --data.")] = "text",
    id_: Annotated[
        str | None,
        typer.Option(
            "--id",
            help="Column of the name in --data [default: a hash of the text, or the data.id of MODEL's run].",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write all answers to this .json, .csv or .parquet.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Find the documents that stand behind a text, by influence on its loss.

    Positive: the document lowers the loss of the text.

    Example: assay search idx runs/mine --query "The court finds that" --top 5
    """
    import assay
    from assay.cli.language import batches_of, load, summed_loss
    from assay.cli.progress import make_console

    if not query:
        raise InputError("--query: give at least one text or file")
    check_out(out)
    texts = [_text(given) for given in query]
    found = assay.Index.open(index)
    network, tokenizer, tokens = load(model, tokens, device)
    batches = (batch for _, batch in batches_of(range(len(texts)), texts, tokenizer, tokens, 1, device))
    answers = found.search(
        network, batches, summed_loss, top, damping, normalize, curvature,  # type: ignore[arg-type]
    )  # fmt: skip
    if data is not None:
        answers = answers.join(
            _texts(found.ids, data, text, id_, model), on="id", how="left", maintain_order="left"
        )
    if out is not None:
        write_out(out, answers)
    console = make_console()
    for number, asked in enumerate(texts):
        console.print(f"\n{_short(asked, 100)}", highlight=False, markup=False)
        for row in answers.filter(query=number).iter_rows(named=True):
            line = f"{row['score']:+.3e}  {row['id']}  {_short(str(row.get('text') or ''), 60)}"
            console.print(line, highlight=False, markup=False, no_wrap=True, overflow="ellipsis")


def _text(given: str) -> str:
    path = Path(given)
    try:
        text = path.read_text(encoding="utf-8") if len(given) < 256 and path.is_file() else given
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--query {given} cannot be read ({error}): give a text, or a file of text in UTF-8"
        ) from error
    if not text.strip():
        raise InputError(f"--query {given!r} holds no text: give at least two tokens")
    return text


def _short(text: str, width: int) -> str:
    return " ".join(text.split())[:width]


def _texts(ids: pl.Series, path: Path, text: str, id_: str | None, model: str) -> pl.DataFrame:
    """`id, text` of documents that the index, or some of it, was made from."""
    from assay.train import Data, read_documents

    def known() -> bool:
        return found["id"].dtype == ids.dtype and bool(found["id"].is_in(ids.implode()).any())

    data = Data(path=path, text=text, id=id_)
    found = read_documents(data)
    if id_ is None and not known() and (likely := _id_column(model)) is not None:
        with suppress(InputError):  # it has no such column
            found = read_documents(data.model_copy(update={"id": likely}))
    if not known():
        raise InputError(
            f"--data {path}: none of its ids is one of the index's; name the column of ids with --id"
        )
    return found.select("id", "text").unique("id", keep="first")


def _id_column(model: str) -> str | None:
    """What the documents of the model's run were named by, if it is the folder of one."""
    from assay.store import open_ledger
    from assay.train import id_column

    return id_column(open_ledger(model)) if (Path(model) / "model").is_dir() else None
