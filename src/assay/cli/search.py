"""``assay search``: which documents of an index stand behind a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli.options import Debug
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
    id_: Annotated[str | None, typer.Option("--id", help="Column of the name in --data.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write all answers to this .json or .parquet.")
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
    if out is not None and out.suffix not in (".json", ".parquet"):
        raise InputError(f"--out {out}: name a .json or a .parquet file")
    found = assay.Index.open(index)
    network, tokenizer, tokens = load(model, tokens, device)
    texts = [_text(given) for given in query]
    batches = (batch for _, batch in batches_of(range(len(texts)), texts, tokenizer, tokens, 1, device))
    answers = found.search(
        network, batches, summed_loss, top, damping, normalize, curvature,  # type: ignore[arg-type]
    )  # fmt: skip
    if data is not None:
        answers = _with_texts(answers, data, text, id_)
    if out is not None:
        answers.write_json(out) if out.suffix == ".json" else answers.write_parquet(out)
    console = make_console()
    for number, asked in enumerate(texts):
        console.print(f"\n{_short(asked, 100)}", highlight=False, markup=False)
        for row in answers.filter(query=number).iter_rows(named=True):
            line = f"{row['score']:+.3e}  {row['id']}  {_short(str(row.get('text') or ''), 60)}"
            console.print(line, highlight=False, markup=False, no_wrap=True, overflow="ellipsis")


def _text(given: str) -> str:
    path = Path(given)
    try:
        return path.read_text(encoding="utf-8") if len(given) < 256 and path.is_file() else given
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--query {given} cannot be read ({error}): give a text, or a file of text in UTF-8"
        ) from error


def _short(text: str, width: int) -> str:
    return " ".join(text.split())[:width]


def _with_texts(answers: pl.DataFrame, data: Path, text: str, id_: str | None) -> pl.DataFrame:
    """The answers with a column `text`."""
    from assay.train import Data, read_documents

    documents = (
        read_documents(Data(path=data, text=text, id=id_)).select("id", "text").unique("id", keep="first")
    )
    if documents.schema["id"] != answers.schema["id"]:
        raise InputError(f"--data {data}: its ids are not those of the index; name the column with --id")
    return answers.join(documents, on="id", how="left", maintain_order="left")
