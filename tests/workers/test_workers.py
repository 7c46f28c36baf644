"""The same tasks by processes of this machine and by Ray: the same results, whoever dies on the way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from assay.errors import AssayError, InputError
from assay.workers import Local, Workers

sys.path.insert(0, str(Path(__file__).parent))  # processes that are started find the tasks by this name
import chores


def _ray() -> Iterator[Workers]:
    ray = pytest.importorskip("ray")
    from assay.integrations.ray import RayWorkers

    path = {"PYTHONPATH": str(Path(__file__).parent)}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": path})
    try:
        yield RayWorkers(retries=1)
    finally:
        ray.shutdown()


@pytest.fixture(scope="module", params=["local", "ray"])
def workers(request: pytest.FixtureRequest) -> Iterator[Workers]:
    if request.param == "local":
        yield Local(2, retries=1)
    else:
        yield from _ray()


pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:.*ray.*:FutureWarning")


def test_results_come_in_order(workers: Workers) -> None:
    assert workers.number == 2
    assert list(workers.run(chores.square, [(x,) for x in range(20)])) == [x * x for x in range(20)]
    assert list(workers.run(chores.square, [])) == []


def test_an_error_is_the_functions_own(workers: Workers) -> None:
    with pytest.raises(InputError, match="2 is not wanted"):
        list(workers.run(chores.refuse, [(x,) for x in range(5)]))


def test_a_task_of_a_worker_that_dies_is_done_again(workers: Workers, tmp_path: Path) -> None:
    assert list(workers.run(chores.die_once, [(x, str(tmp_path)) for x in range(1, 5)])) == [1, 2, 3, 4]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_task_that_always_dies_is_given_up(workers: Workers) -> None:
    with pytest.raises(AssayError, match=r"same task \(die\)"):
        list(workers.run(chores.die, [(1,)]))


def test_tasks_are_taken_as_workers_become_free(workers: Workers, tmp_path: Path) -> None:
    taken = []

    def tasks() -> Iterator[tuple[int, str]]:
        for x in range(30):
            taken.append(x)
            yield x, str(tmp_path)

    for n, _ in enumerate(workers.run(chores.noted, tasks())):
        assert len(taken) <= n + 2
    assert len(taken) == 30


def test_one_process_is_this_one() -> None:
    assert list(Local(1).run(chores.square, [(3,)])) == [9]
    with pytest.raises(InputError, match="at least one"):
        Local(0)


def test_an_index_built_and_searched_by_workers(workers: Workers, tmp_path: Path) -> None:
    def tree(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    alone = chores.build(tmp_path / "alone", None)
    together = chores.build(tmp_path / "together", workers)
    assert tree(tmp_path / "together") == tree(tmp_path / "alone")
    queries = [chores.batch(99)]
    for normalize in (None, "relatif", "unit"):
        found = together.search(
            chores.net(), queries, chores.loss_fn, k=5, normalize=normalize, workers=workers
        )
        assert found.equals(alone.search(chores.net(), queries, chores.loss_fn, k=5, normalize=normalize))


def test_an_index_in_memory_is_one_processs(workers: Workers) -> None:
    with pytest.raises(InputError, match="give out="):
        chores.build(None, workers)
    index = chores.build(None, None)
    with pytest.raises(InputError, match="in memory"):
        index.search(chores.net(), [chores.batch(99)], chores.loss_fn, workers=workers)


def test_retraining_by_workers(workers: Workers, tmp_path: Path) -> None:
    alone = chores.truth(None)
    assert chores.truth(workers, tmp_path / "cache").equal(alone)
    for path in sorted((tmp_path / "cache" / "losses").iterdir())[::2]:
        path.unlink()
    assert chores.truth(workers, tmp_path / "cache").equal(alone)
