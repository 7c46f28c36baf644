"""``assay index``: log the gradients of documents on a trained language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay.cli.options import Debug
from assay.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

__all__ = ["index"]

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8, "int8": 1}


def index(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A run of assay train, or a transformers model (folder or name)."
        ),
    ],
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A folder of texts, a .jsonl or a .parquet file.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the index.")],
    text: Annotated[str, typer.Option("--text", help="Column of the text.")] = "text",
    id_: Annotated[
        str | None, typer.Option("--id", help="Column that names a document [default: a hash of its text].")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first so many documents.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of a document that count.")] = 256,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Documents of a batch.")] = 8,
    rank: Annotated[
        int, typer.Option("--rank", min=1, help="Of the projection, on each side of a weight.")
    ] = 64,
    support: Annotated[
        int | None,
        typer.Option(
            "--support", min=1, help="Read only so many coordinates of each wider side of a weight."
        ),
    ] = None,
    kind: Annotated[str, typer.Option("--projection", help="random, pca or none.")] = "random",
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of the rows: bf16, fp16, fp32, fp64 or int8.")
    ] = "bf16",
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps.")] = "cpu",
    part: Annotated[
        str | None,
        typer.Option("--part", metavar="P/N", help="Log part P (from 0) of N; join them with --join."),
    ] = None,
    join: Annotated[
        int | None,
        typer.Option("--join", metavar="N", min=1, help="Make an index of N logged parts complete."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Log projected gradients of documents on a trained language model, for `assay search`.

    Called again after a break-off, it goes on at its last commit. Several processes log one index with --part 0/4,
    1/4, …, and one of them ends it with --join 4.

    Example: assay index runs/mine texts.parquet --out idx --rank 16
    """
    from assay.cli.language import batches_of, load, summed_loss
    from assay.cli.progress import make_console
    from assay.index import Index
    from assay.projection import Projection
    from assay.train import Data, read_documents

    console = make_console()
    if join is not None:
        console.print(f"{len(Index.join(out, join))} documents in {out}")
        return
    share = _part(part)
    if dtype not in BYTES:
        raise InputError(f"--dtype {dtype}: choose one of {', '.join(BYTES)}")
    projection = Projection(rank=rank, kind=kind, support=support)  # type: ignore[arg-type]
    documents = read_documents(Data(path=data, text=text, id=id_, limit=limit))
    network, tokenizer, tokens = load(model, tokens, device)
    ids, texts = documents["id"].to_list(), documents["text"].to_list()

    class Batches:
        """Read again at every pass."""

        def __iter__(self) -> Iterator[Any]:
            return batches_of(ids, texts, tokenizer, tokens, batch, device)

    _announce(console, network, next(iter(Batches()))[1], len(ids), batch, projection, dtype)
    with _Progress(console, len(ids)) as progress:
        options: dict[str, Any] = {
            "out": out, "projection": projection, "dtype": dtype, "reduction": "sum", "progress": progress,
        }  # fmt: skip
        if share is None:
            Index.build(network, Batches(), summed_loss, **options)
        else:
            Index.build_part(network, Batches(), summed_loss, *share, **options)
    console.print(f"index: {out}", soft_wrap=True)


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = text.split("/")
    if len(found) != 2 or not all(number.isdecimal() for number in found):
        raise InputError(f"--part {text}: expected P/N, such as 0/4")
    return int(found[0]), int(found[1])


def _announce(
    console: Console, model: Any, example: Any, documents: int, batch: int, projection: Any, dtype: str
) -> None:
    """How long and how large, before it starts: from the shapes, and from the time of one batch."""
    import time

    from assay.cli.language import summed_loss
    from assay.projection import random_sides

    width = sum(random_sides(n, p, projection).width for n, p in model.named_parameters() if p.requires_grad)
    started = time.perf_counter()
    summed_loss(model, example).backward()  # type: ignore[no-untyped-call]
    seconds = (time.perf_counter() - started) * documents / min(batch, documents)
    model.zero_grad(set_to_none=True)
    passes = 2 if projection.kind == "pca" else 1
    console.print(
        f"{documents} documents, {width:,} numbers each: about {width * BYTES[dtype] * documents / 1e6:,.0f} MB on "
        f"disk, {passes * seconds / 60:,.1f} minutes of logging (by the time of one batch), and the curvature after it",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


class _Progress:
    """A bar in a terminal, a line now and then in a log."""

    def __init__(self, console: Console, total: int) -> None:
        from rich.progress import Progress

        self._total, self._console, self._said = total, console, 0
        self._bar = Progress(console=console) if console.is_terminal else None

    def __enter__(self) -> Callable[[int], None]:
        if self._bar is not None:
            self._bar.start()
            task = self._bar.add_task("logging", total=self._total)
            return lambda done: self._bar.update(task, completed=done)  # type: ignore[union-attr]
        return self._line

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _line(self, done: int) -> None:
        if done * 20 // self._total > self._said:
            self._said = done * 20 // self._total
            self._console.print(f"logged {done}/{self._total}", highlight=False)
