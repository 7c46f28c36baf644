"""Memory that is used again."""

from __future__ import annotations

import pytest
import torch

from assay.capture import room

CPU = torch.device("cpu")


def test_memory_is_used_again_once_nothing_refers_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LARGE", 1)
    memory = room.Room()
    first = memory.empty((4, 3), torch.float32, CPU)
    part, place = first[1:], first.data_ptr()
    del first  # a view of it is still there
    other = memory.empty((4, 3), torch.float32, CPU).data_ptr()
    assert other != place
    del part
    assert {memory.empty((2, 6), torch.bfloat16, CPU).data_ptr() for _ in range(4)} <= {place, other}
    memory.clear()
    assert memory._free == []


@pytest.mark.parametrize("shape", [(1 << 18,), (1, 3, 100_003), (600, 601)])
def test_memory_begins_with_a_cache_line(shape: tuple[int, ...]) -> None:
    memory = room.Room()
    held = [memory.empty(shape, torch.float32, CPU) for _ in range(4)]  # four places at once
    assert [x.data_ptr() % 64 for x in held] == [0] * 4
    del held
    assert memory.empty(shape, torch.float32, CPU).data_ptr() % 64 == 0
