"""`python -m shared.parallel.follower SOCKET`: a rank of a worker, but the leading one, which starts it as its child.

It loads its slice of the model, and then does what the leading rank says (link.py): a forward of the same entries on
every rank. It has a pool of its own heads, and writes there only the blocks that the entries name; whatever else
becomes of the pool's blocks is the leading rank's doing (shared/engine/leading.py).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

from shared.arguments import die_with_parent, set_threads
from shared.config import TandemConfig
from shared.logs import configure_logs
from shared.parallel.link import Kind, Link, rendezvous

if TYPE_CHECKING:
    from shared.engine import Engine, EnginePlan
    from shared.transport.device_pool import MappedDeviceMemory
    from shared.transport.pool_memory import MappedMemory

log = logging.getLogger(__name__)

MOST_TEXT = 2000


def serve(link: Link) -> None:
    """Follows until it is told to stop. Raises what a step raises, and EOFError once the leading rank is gone."""
    from shared.cores import Cores
    from shared.parallel.entries import decode_entries

    kind, body = link.receive()
    assert kind is Kind.START
    engine, memory = _load(link, json.loads(body))
    engine.use_thread()
    cores = Cores.join() if engine.plan.device == "cpu" else Cores()
    link.send(Kind.DONE)
    while True:
        kind, body = link.receive()
        if kind is Kind.STOP:
            cores.leave()
            return
        with cores.computing():
            if kind is Kind.WARM_UP:
                engine.warm_up()
            else:
                assert kind is Kind.FORWARD
                engine.forward(decode_entries(body))
        # what the leading rank does with the pool from now on comes after it
        memory.settle()
        link.send(Kind.DONE)


def _load(link: Link, told: dict[str, Any]) -> tuple[Engine, MappedMemory | MappedDeviceMemory]:
    """The engine of a rank that has joined the others, and what its pool lies in."""
    config = TandemConfig(**told["config"])
    section = config.prefill if told["role"] == "prefill" else config.decode
    configure_logs(config.log_level)
    set_threads(config.threads)  # before torch is imported; the engine divides them between the ranks
    from shared.engine import Engine, EnginePlan
    from shared.engine.engine import load_plan
    from shared.model_store import ModelStore
    from shared.parallel.sharding import Shard
    from shared.parallel.start import start_group

    files = ModelStore().resolve(config.model, allow_pickle=config.allow_pickle)
    plan = EnginePlan.of(config, section, files, Shard(told["rank"], told["size"]))
    memory = _map(plan, told["rank"], *told["memory"])
    link.send(Kind.DONE)
    weights = load_plan(plan)
    link.send(Kind.DONE)
    kind, _ = link.receive()
    assert kind is Kind.JOIN
    group = start_group(
        rank=told["rank"], size=told["size"], rendezvous=rendezvous(told["meeting"]), device=plan.device
    )
    return Engine(plan, memory, weights=weights, group=group), memory


def _map(plan: EnginePlan, rank: int, descriptor: int, num_bytes: int) -> MappedMemory | MappedDeviceMemory:
    """On a device it is that with the rank's number, which is this process's own from now on."""
    if plan.device == "cpu":
        from shared.transport.pool_memory import MappedMemory

        return MappedMemory(descriptor, plan.pool_bytes)
    import torch

    from shared.transport.cuda import CudaDriver
    from shared.transport.device_pool import MappedDeviceMemory

    torch.cuda.set_device(rank)
    return MappedDeviceMemory(CudaDriver(rank), descriptor, num_bytes, plan.pool_bytes)


def main() -> None:
    die_with_parent(signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    link = Link(socket.socket(fileno=int(sys.argv[1])))
    status = 0
    try:
        serve(link)
    except EOFError:
        status = 1
    except Exception as error:
        status = 1
        log.debug("this rank failed", exc_info=True)
        try:
            link.send(Kind.FAILED, f"{type(error).__name__}: {error}"[:MOST_TEXT].encode())
        except EOFError:
            log.error("this rank failed and has nobody to tell: %s", error)
    logging.shutdown()
    # as a worker ends: what is left is the kernel's to take
    os._exit(status)


if __name__ == "__main__":
    main()
