"""Every check of `tandem doctor`, in order.

for group, findings in examine(Surroundings(load_config())).items():
    for finding in findings:
        print(finding.level, finding.message, finding.remedy)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence

from shared.doctor import container, gpu_driver, gpus, host, limits, software
from shared.doctor.cluster import cluster
from shared.doctor.finding import Finding, warning
from shared.doctor.socket_folder import socket_folder
from shared.doctor.surroundings import Surroundings

Check = Callable[[Surroundings], Iterator[Finding]]

CHECKS: Mapping[str, Sequence[Check]] = {
    "host": (
        host.cpu_ops,
        host.cores,
        host.shared_cores,
        host.memory,
        host.overcommit,
        host.memory_files,
        socket_folder,
        software.versions,
        software.foreign_kernels,
    ),
    "ops": (software.ops,),
    "container": (
        container.user,
        container.cache,
        container.temporary_folder,
        container.namespaces,
        limits.memory,
        limits.cpu_quota,
        limits.open_files,
        limits.processes,
        limits.locked_memory,
    ),
    "GPU": (
        gpu_driver.driver,
        gpu_driver.capabilities,
        gpu_driver.visibility,
        gpus.order,
        gpus.mig,
        gpus.peer_access,
        gpus.clocks,
        software.allocator,
    ),
}


def examine(surroundings: Surroundings, *, ask_cluster: bool | None = False) -> dict[str, list[Finding]]:
    """The findings by group. ask_cluster: None = if anybody answers."""
    groups = {
        group: [finding for check in checks for finding in attempt(check, surroundings)]
        for group, checks in CHECKS.items()
    }
    if ask_cluster is not False:

        def ask(surroundings: Surroundings) -> Iterator[Finding]:
            yield from asyncio.run(cluster(surroundings, must_answer=ask_cluster is True))

        groups["cluster"] = list(attempt(ask, surroundings))
    return groups


def attempt(check: Check, surroundings: Surroundings) -> Iterator[Finding]:
    """The findings of a check; one that itself fails is a finding too, and keeps no other from being made."""
    try:
        yield from check(surroundings)
    except Exception as failure:
        name = check.__name__.replace("_", " ")
        yield warning(name, "check failed", f"it could not be looked at: {type(failure).__name__}: {failure}")
