"""Two processes that train all cases: `python worker.py FOLDER [CASE …]`; started by conftest.py."""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distributed import elastic, refusals
from distributed.cases import CASES, train
from errors import recorder

SIZE = 2


def work(rank: int, folder: str, names: list[str]) -> None:
    recorder.follow()
    warnings.simplefilter("error", category=UserWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=SIZE)
    for name in names:
        out = Path(folder) / name
        started = time.perf_counter()
        try:
            if name in CASES:
                _, weights = train(CASES[name], out, rank, SIZE)
                if rank == 0:
                    torch.save(weights, Path(folder) / f"{name}.weights")
            else:
                scenario = getattr(elastic if name in elastic.NAMES else refusals, name)
                scenario(rank, SIZE, out)
                (Path(folder) / f"{name}.done-{rank}").touch()
        except Exception:
            (Path(folder) / f"{name}.error-{rank}").write_text(traceback.format_exc())
            os._exit(1)  # the other process would wait for this one
        if rank == 0:
            print(f"{name} {time.perf_counter() - started:.2f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    where, *chosen = sys.argv[1:]
    mp.spawn(work, args=(where, chosen or [*CASES, *refusals.NAMES, *elastic.NAMES]), nprocs=SIZE)
