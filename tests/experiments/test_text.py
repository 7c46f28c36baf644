"""The experiments on text: each by hand on what is small enough to see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.beside import needs_data

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "experiments" / "evidence"


@pytest.fixture(autouse=True)
def _experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def settings() -> Any:
    from experiments.evidence.pile import PileSettings
    from experiments.settings import read_settings

    return read_settings(PileSettings, EVIDENCE / "curation.yaml", "tiny")


class Corpus:
    """Twenty documents, of which only the number is asked."""

    def __len__(self) -> int:
        return 20


def test_what_is_left_out_is_left_out_and_the_rest_keeps_its_order(settings: Any) -> None:
    from experiments.evidence.pile import order

    settings = settings.model_copy(update={"passes": 2, "batch": 5})
    everything = order(settings, Corpus(), torch.arange(20), seed=3).flatten()  # type: ignore[arg-type]
    kept = torch.tensor([i for i in range(20) if i % 4])
    some = order(settings, Corpus(), kept, seed=3).flatten()  # type: ignore[arg-type]
    assert sorted(everything[:20].tolist()) == list(range(20))
    assert len(some) == len(everything) == 40
    assert some[:30].tolist() == [i for i in everything.tolist() if i % 4]
    assert set(some.tolist()) == set(kept.tolist())


def test_every_arm_leaves_out_as_many_and_what_it_says() -> None:
    from experiments.evidence.curation import choices

    values = torch.tensor([-1.0, 2, -0.5, 3, 1, 0.1, 4, -2, 5, 6]).double()
    late = torch.tensor([0.0, 2, 1, -3, 1, -4, 4, -2, 5, 6]).double()
    loss = torch.arange(10).float()
    domains = ["a"] * 5 + ["b"] * 5
    found = choices({"all": values, "no warm-up": late}, domains, loss, seed=0)
    assert {name: len(ids) for name, ids in found.items()} == dict.fromkeys(found, 3)
    assert set(found["negative"].tolist()) == {0, 2, 7}
    assert set(found["no warm-up"].tolist()) == {3, 5, 7}
    assert set(found["top loss"].tolist()) == {7, 8, 9}
    assert set(found["highest"].tolist()) == {6, 8, 9}
    assert (
        sum(int(i) < 5 for i in found["same mixture"]) == 2
    )  # two of the negative ones are of the first domain


def test_values_are_added_up_as_the_names_say() -> None:
    import polars as pl

    from experiments.evidence.curation import summed

    steps = pl.DataFrame(
        {
            "step": [0, 0, 1, 1, 2, 2],
            "id": [0, 1, 2, 0, 2, 1],
            "x": [8.0, -4, 1, 1, -2, 2],
            "y": [0.0, 0, 1, 1, -2, 2],
        }
    )
    found = {name: values.tolist() for name, values in summed(steps, ["x", "y"], first=1, length=3).items()}
    assert found == {
        "all": [5, 0, -1],
        "no warm-up": [1, 2, -1],
        "even steps": [pytest.approx(4 / 3 + 1), pytest.approx(-2 / 3 + 1), 0],
        "first pass": [4, -2, 1],
        "second pass": [1, 2, -2],
    }
    with pytest.raises(ValueError, match="1 documents were never seen"):
        summed(steps, ["x"], first=0, length=4)


@pytest.mark.parametrize(("level", "where"), [(5.0, 10.0), (3.0, 15.0), (2.0, 20.0), (1.5, None)])
def test_where_a_loss_comes_down_to_a_level(level: float, where: float | None) -> None:
    from experiments.evidence.curation import reach

    assert reach([10, 20, 30], [4.0, 2.0, 3.0], level) == where


def test_ranks_count_from_one_and_share_a_tie() -> None:
    from experiments.evidence.ladder import ranks

    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0], [0.0, 5.0, 5.0]])
    assert ranks(scores, [1, 0, 2]) == [2.0, 2.0, 1.5]


def test_a_piece_is_computed_once_for_the_same_settings(settings: Any, tmp_path: Path) -> None:
    from experiments.command import Pieces

    calls: list[int] = []

    def compute() -> int:
        calls.append(len(calls))
        return len(calls)

    assert [Pieces(tmp_path, settings).once("a", compute) for _ in range(2)] == [1, 1]
    other = settings.model_copy(update={"passes": 7})
    assert Pieces(tmp_path, other).once("a", compute) == 2
    assert Pieces(tmp_path, settings.model_copy(update={"seeds": [5]})).once("b", compute) == 3


@needs_data
def test_valuing_the_documents_changes_nothing_of_their_training(settings: Any, tmp_path: Path) -> None:
    from experiments.evidence.pile import draw, learn, steps_of, valued

    corpus = draw(settings, seed=1)
    plain = learn(settings, corpus, torch.arange(len(corpus)), seed=1)
    watched, ledger = valued(settings, corpus, 1, tmp_path / "run")
    assert watched.curve == plain.curve
    assert torch.equal(watched.test, plain.test)
    assert ledger.values("bible").height == len(corpus)
    assert ledger.steps("bible")["step"].max() == steps_of(settings, corpus) - 1


@needs_data
def test_the_neighbour_of_a_verse_is_asked_but_not_trained_on() -> None:
    import polars as pl

    from experiments.evidence.ladder import SETTINGS, VERSES, LadderSettings, climb, shared_words
    from experiments.settings import read_settings

    s = read_settings(LadderSettings, SETTINGS, "quick")
    found = climb(s, seed=4)
    assert len(found.documents) == len(set(found.documents)) == s.verses + s.others
    frame = pl.read_parquet(VERSES)
    in_web = dict(zip(frame["web"], frame["kjv"], strict=True))
    for query, rung, original in zip(found.queries, found.rungs, found.originals, strict=True):
        text = found.documents[original]
        if rung == "verbatim":
            assert query == text
        elif rung == "same topic":
            assert in_web[query] not in found.documents
        else:
            share = shared_words(query, text)
            assert in_web[query] == text
            assert share >= s.light if rung == "light" else share <= s.heavy


def test_what_one_more_costs_is_known_to_what_any_two_rounds_say() -> None:
    from experiments.evidence.cost import slope
    from experiments.evidence.text_page import milliseconds

    found = slope([1.0, 1.2, 1.1], [3.1, 3.6, 3.0], more=10)
    assert found == pytest.approx({"seconds": 0.2, "low": 0.18, "high": 0.26})
    assert milliseconds(found) == "200 (180 to 260)"
    assert milliseconds({"seconds": 2.8942, "low": 2.5, "high": 3.14}) == "2,900 (2,500 to 3,100)"
    assert milliseconds(slope([1.0, 1.2], [1.1, 1.05], more=10)) == "< 10"
    assert milliseconds(slope([1.0, 1.2], [0.9, 0.95], more=10)) == "below noise"
    assert milliseconds(None) == ""
