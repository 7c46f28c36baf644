"""Cut the demo corpus out of the mini-Pile: ``python scripts/make_corpus.py path/to/minipile.parquet``.

The selection depends on nothing but the input. In the order of the SHA-256 of their id, pieces are taken
until each domain holds the same number of characters, and the corpus stands in that order. Writes the corpus
and the table of its data card.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections import Counter
from pathlib import Path

import polars as pl

LICENCES = ("public domain", "CC0", "BSD-3-Clause", "PSF-2.0")
CHARACTERS_PER_DOMAIN = 215_000
SHORTEST, LONGEST = 300, 1_000
COLUMNS = ["id", "domain", "source", "license", "text"]
FOLDER = Path(__file__).parents[1] / "src" / "assay" / "demo"


def shorten(text: str, longest: int = LONGEST) -> str:
    """Cut after the last paragraph, line, sentence or word that fits: the first of these that keeps half."""
    if len(text) <= longest:
        return text
    for boundary in ("\n\n", "\n", ". ", " "):
        end = text.rfind(boundary, 0, longest - len(boundary))
        if end >= longest // 2:
            return text[: end + len(boundary)].rstrip()
    return text[:longest]


def select(pieces: pl.DataFrame) -> pl.DataFrame:
    """Take whole pieces, shortened, until each domain has reached its share of characters."""
    pieces = pieces.select(COLUMNS).filter(
        pl.col("license").is_in(LICENCES), pl.col("text").str.len_chars() >= SHORTEST
    )
    kept: list[dict[str, str]] = []
    seen: set[str] = set()
    characters: Counter[str] = Counter()
    for row in sorted(pieces.to_dicts(), key=lambda row: hashlib.sha256(row["id"].encode()).digest()):
        text = shorten(row["text"].rstrip())
        if characters[row["domain"]] < CHARACTERS_PER_DOMAIN and len(text) >= SHORTEST and text not in seen:
            seen.add(text)
            characters[row["domain"]] += len(text)
            kept.append({**row, "text": text})
    return pl.DataFrame(kept, schema=dict.fromkeys(COLUMNS, pl.String))


def table(corpus: pl.DataFrame) -> str:
    """The data card's table: one line per domain with its source, licence and counts."""
    counts = corpus.group_by("domain", "source", "license").agg(
        pl.len().alias("documents"), pl.col("text").str.len_chars().sum().alias("characters")
    )
    lines = ["| domain | source | licence | documents | characters |", "|---|---|---|---:|---:|"]
    lines += [
        "| {domain} | {source} | {license} | {documents:,} | {characters:,} |".format(**row)
        for row in counts.sort("domain").to_dicts()
    ]
    total = corpus["text"].str.len_chars().sum()
    return "\n".join([*lines, f"| all | | | {corpus.height:,} | {total:,} |"])


def main() -> None:
    """Write ``corpus.parquet`` and bring the table in ``DATA_CARD.md`` up to date."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "pieces", type=Path, help="Parquet file with the columns id, domain, source, license, text"
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of corpus.parquet and DATA_CARD.md")
    arguments = parser.parse_args()

    corpus = select(pl.read_parquet(arguments.pieces))
    corpus.write_parquet(arguments.out / "corpus.parquet", compression="zstd", compression_level=19)
    card = arguments.out / "DATA_CARD.md"
    if card.exists():
        pattern = re.compile(r"(?<=<!-- counts -->\n).*?(?=\n<!-- /counts -->)", re.DOTALL)
        card.write_text(
            pattern.sub(lambda _: table(corpus), card.read_text(encoding="utf-8")), encoding="utf-8"
        )
    print(table(corpus))


if __name__ == "__main__":
    main()
