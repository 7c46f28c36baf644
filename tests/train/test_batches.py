"""Every token of every document is trained on once per epoch, and padding counts for nothing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.demo import IGNORED
from assay.train.batches import Row, batch_rows, make_batch, make_rows


@given(st.lists(st.integers(2, 30), min_size=1, max_size=10), st.integers(2, 12))
def test_split_rows_hold_every_target_once(lengths: list[int], context: int) -> None:
    sequences = [list(range(100 * n, 100 * n + length)) for n, length in enumerate(lengths)]
    rows = make_rows(range(len(lengths)), sequences, context, "split")
    assert all(2 <= len(row.tokens) <= context + 1 for row in rows)
    for n, sequence in enumerate(sequences):
        parts = [row.tokens for row in rows if row.id == n]
        assert [token for part in parts for token in part[1:]] == sequence[1:]
        assert [token for part in parts for token in part[:-1]] == sequence[:-1]


def test_cut_rows_hold_the_beginning() -> None:
    assert make_rows(["a", "b"], [[1, 2, 3, 4], [5, 6]], 2, "cut") == [Row("a", [1, 2, 3]), Row("b", [5, 6])]


def test_a_batch_is_padded_at_the_end() -> None:
    batch = make_batch([Row("a", [1, 2, 3, 4]), Row("b", [5, 6])])
    assert batch.tokens.tolist() == [[1, 2, 3], [5, 0, 0]]
    assert batch.targets.tolist() == [[2, 3, 4], [6, IGNORED, IGNORED]]


@pytest.mark.parametrize("count", [1, 7, 64, 100])
def test_an_epoch_sees_every_row_once(count: int) -> None:
    rows = [Row(n, [0] * (2 + n % 9)) for n in range(count)]
    batches = list(batch_rows(rows, 8, torch.Generator().manual_seed(1), pool=4))
    assert Counter(row.id for batch in batches for row in batch) == Counter(range(count))
    assert all(len(batch) == 8 for batch in sorted(batches, key=len)[1:])


def test_the_order_depends_on_the_seed_alone() -> None:
    rows = [Row(n, [0] * (2 + n % 5)) for n in range(50)]

    def epoch(seed: int) -> list[list[Row]]:
        return list(batch_rows(rows, 8, torch.Generator().manual_seed(seed)))

    assert epoch(3) == epoch(3)
    assert epoch(3) != epoch(4)


def test_rows_of_like_length_go_together() -> None:
    lengths = torch.randint(2, 400, (512,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [Row(n, [0] * length) for n, length in enumerate(lengths)]
    batches = list(batch_rows(rows, 16, torch.Generator().manual_seed(0)))
    padded = sum(len(batch) * max(len(row.tokens) for row in batch) for batch in batches)
    assert padded < 1.15 * sum(lengths)
