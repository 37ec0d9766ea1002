"""What a container, or a login, may take: memory, cores, processes, open files, locked memory."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator

from shared.doctor.cgroup import Cgroup
from shared.doctor.demand import MIB, Demand, mib
from shared.doctor.finding import Finding, error, ok, warning
from shared.doctor.surroundings import Surroundings


def memory(surroundings: Surroundings) -> Iterator[Finding]:
    limit = _cgroup(surroundings).memory_bytes
    demand = Demand.of(surroundings.config)
    if limit is None:
        yield ok("memory", "no limit on memory but the host's")
        return
    if limit < demand.smallest_bytes:
        text = f"{mib(limit)} of memory, and one worker alone takes {mib(demand.smallest_bytes)} at least: it is killed"
        yield error("memory", "memory limit too low", text, **_sizes(demand.smallest_bytes))
    elif limit < demand.total_bytes:
        text = (
            f"{mib(limit)} of memory: enough for one worker ({mib(demand.smallest_bytes)} at least), "
            f"not for all of `tandem up` ({mib(demand.total_bytes)}), of which one is killed"
        )
        yield warning("memory", "memory limit below all workers", text, **_sizes(demand.total_bytes))
    else:
        yield ok("memory", f"{mib(limit)} of memory, and `tandem up` takes {mib(demand.total_bytes)} at least")


def cpu_quota(surroundings: Surroundings) -> Iterator[Finding]:
    cpus, cores = _cgroup(surroundings).cpus, len(os.sched_getaffinity(0))
    threads = surroundings.config.threads or cores
    if cpus is not None and cpus < threads:
        text = (
            f"time of {cpus:g} cores, and each worker computes with {threads} threads: "
            "they use it up together and then stand still, all of them, until more is given"
        )
        yield warning("cpu quota", "CPU quota", text, cpus=max(1, math.floor(cpus)))
    elif cpus is not None:
        yield ok("cpu quota", f"time of {cpus:g} cores for {threads} threads of each worker")
    else:
        yield ok("cpu quota", "no limit on the time of the cores")


def open_files(surroundings: Surroundings) -> Iterator[Finding]:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = Demand.of(surroundings.config).files
    if limit != resource.RLIM_INFINITY and limit < wanted:
        text = f"{limit} open files, and with its connections a process may want {wanted}: it then turns clients away"
        yield warning("open files", "few open files", text, nofile=max(wanted, 65536))
    else:
        yield ok("open files", f"{limit if limit >= 0 else 'any number of'} open files")


def processes(surroundings: Surroundings) -> Iterator[Finding]:
    limits = [_cgroup(surroundings).processes]
    if os.geteuid():  # root may exceed its own
        own, _ = resource.getrlimit(resource.RLIMIT_NPROC)
        limits.append(own if own != resource.RLIM_INFINITY else None)
    limit = min((limit for limit in limits if limit is not None), default=None)
    wanted = Demand.of(surroundings.config).threads
    if limit is not None and limit < wanted:
        text = f"{limit} processes and threads, and `tandem up` takes {wanted}: one of them cannot start"
        yield warning("processes", "few processes", text, pids=max(4096, wanted))
    else:
        yield ok("processes", f"{limit or 'any number of'} processes and threads")


def locked_memory(surroundings: Surroundings) -> Iterator[Finding]:
    """For hosts with GPUs alone: on a CPU nothing is locked."""
    if not surroundings.needs_gpu and not (surroundings.may_use_gpu and surroundings.gpu_nodes):
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    wanted = surroundings.config.decode.swap_memory_mib * MIB
    if limit != resource.RLIM_INFINITY and limit < wanted:
        text = (
            f"{mib(limit)} may be locked in memory, and decode.swap_memory_mib is {mib(wanted)}: a driver that counts "
            "what is pinned for copies to the GPU refuses it, and they go through memory that is not pinned"
        )
        yield warning("locked memory", "little locked memory", text)
    else:
        yield ok("locked memory", "as much memory may be locked as copies to a GPU want")


def _cgroup(surroundings: Surroundings) -> Cgroup:
    return Cgroup(surroundings.proc, surroundings.sys / "fs/cgroup")


def _sizes(num_bytes: int) -> dict[str, object]:
    """What is taken at least, with a quarter to spare, in Docker's words and in Kubernetes'."""
    size = math.ceil(num_bytes * 1.25 / MIB)
    return {"memory": f"{size}m", "quantity": f"{size}Mi"}
