"""Runs a function on several processes that are ranks of one gloo group.

def check(group: Group, model: str) -> list[float]: ...          # of a module that processes can import
results = on_ranks(check, 3, "llama")                            # what each rank returned, in order
"""

from __future__ import annotations

import pickle
import tempfile
import traceback
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from shared.parallel.start import end_group, start_group

TIMEOUT_S = 240.0


def on_ranks(
    check: Callable[..., Any], size: int, *args: Any, dying: Collection[int] = (), timeout_s: float = TIMEOUT_S
) -> list[Any]:
    """check(group, *args) on each rank. A process takes seconds to start: let one check much.

    dying: ranks whose process is to end without an answer; theirs is None. Raises AssertionError with the traceback of
    a rank that failed, or naming one that ended, or did not end, against that.
    """
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    with tempfile.TemporaryDirectory(prefix="tandem-ranks-") as folder:
        try:
            for rank in range(size):
                here, there = spawn.Pipe(duplex=False)
                process = spawn.Process(
                    target=_rank, args=(check, rank, size, Path(folder) / "rendezvous", there, args), daemon=True
                )
                process.start()
                there.close()
                pipes.append(here)
                processes.append(process)
            return _results(pipes, dying, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _results(pipes: list[Connection], dying: Collection[int], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[str] = []
    # a rank that failed takes the others with it: what they say is of less use
    while len(results) < len(pipes) and not failures:
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout_s)
        assert ready, f"{len(waiting)} of {len(pipes)} ranks did not end in {timeout_s:g} s"
        for pipe in ready:
            rank = pipes.index(pipe)  # pyright: ignore[reportArgumentType]
            try:
                result, failure = pickle.loads(pipe.recv_bytes())  # pyright: ignore[reportAttributeAccessIssue]
            except EOFError:
                result, failure = None, None if rank in dying else "its process ended"
            results[rank] = result
            if failure:
                failures.append(f"rank {rank} of {len(pipes)}: {failure}")
    assert not failures, "\n".join(failures)
    return [results[rank] for rank in range(len(pipes))]


def _rank(check: Callable[..., Any], rank: int, size: int, place: Path, pipe: Connection, args: tuple) -> None:
    torch.set_num_threads(1)
    try:
        group = start_group(rank=rank, size=size, rendezvous=f"file://{place}", timeout_s=120)
        said = check(group, *args), None
    except BaseException:
        # before its connections close, and other ranks fail for that
        said = None, traceback.format_exc()
    # as bytes: torch would have tensors fetched from this process, which ends
    pipe.send_bytes(pickle.dumps(said))
    end_group()
