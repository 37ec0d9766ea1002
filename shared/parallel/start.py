"""Starts a group of processes that are ranks of one model.

group = start_group(rank=0, size=2, rendezvous="file:///run/tandem/ranks")     # every rank says the same place
group = start_group_of_environment()                                           # as torchrun starts processes
end_group()
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from shared.parallel.group import Group, GroupError
from shared.parallel.loopback import loopback

TIMEOUT_S = 300.0
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start_group(*, rank: int, size: int, rendezvous: str, device: str = "cpu", timeout_s: float = TIMEOUT_S) -> Group:
    """Joins the process's default group, and waits for all ranks.

    rendezvous: file:///PATH of a file that does not exist yet, or tcp://ADDRESS:PORT at which rank 0 listens. device:
    cpu, or cuda, or cuda:INDEX of this rank. timeout_s: of each call of the group, its start too. Ranks that meet on
    this host, by a file or at 127.0.0.1, have their connections there, and nobody else can reach them.
    Raises GroupError if ranks are missing, ValueError for a rank that is none or a process that is one already.
    """
    if dist.is_initialized():
        raise ValueError("this process is a rank already: end_group first")
    if not 0 <= rank < size:
        raise ValueError(f"rank must be one of {size}, got {rank}")
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        torch.cuda.set_device(torch.device(device) if ":" in device else torch.device("cuda", rank))
    is_here = rendezvous.startswith(("file://", "tcp://127.0.0.1:"))
    try:
        with loopback(is_here and not on_cuda):
            dist.init_process_group(
                "nccl" if on_cuda else "gloo",
                init_method=rendezvous,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout_s),
            )
    except RuntimeError as error:
        raise GroupError(f"rank {rank} of {size} found no others at {rendezvous}: {error}") from error
    assert dist.group.WORLD is not None
    return Group.of(dist.group.WORLD, is_here=is_here)


def start_group_of_environment(
    *, device: str = "cpu", timeout_s: float = TIMEOUT_S, environment: Mapping[str, str] | None = None
) -> Group:
    """As torchrun says it: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, and LOCAL_RANK for the CUDA device. ValueError
    naming one that is missing or no number."""
    values = os.environ if environment is None else environment
    if missing := [name for name in _VARIABLES if not values.get(name)]:
        raise ValueError(f"{', '.join(missing)}: not set; start the ranks with torchrun, or set them")
    numbers = {name: _number(name, values[name]) for name in ("RANK", "WORLD_SIZE")}
    if device == "cuda" and values.get("LOCAL_RANK"):
        device = f"cuda:{_number('LOCAL_RANK', values['LOCAL_RANK'])}"
    return start_group(
        rank=numbers["RANK"],
        size=numbers["WORLD_SIZE"],
        rendezvous=f"tcp://{values['MASTER_ADDR']}:{values['MASTER_PORT']}",
        device=device,
        timeout_s=timeout_s,
    )


def end_group() -> None:
    """Leaves the default group, without waiting for the other ranks; once is enough, twice is no harm."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _number(name: str, value: str) -> int:
    if not value.isdecimal():
        raise ValueError(f"{name}: {value!r} is no number")
    return int(value)
