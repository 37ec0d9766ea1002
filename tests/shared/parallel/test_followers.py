"""The processes of a worker's ranks: what they say when they cannot start, and that nothing of them is left."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.config import TandemConfig
from shared.engine import EnginePlan
from shared.model_store import ModelStore
from shared.parallel.followers import Followers, RankMemory
from shared.parallel.group import GroupError
from shared.parallel.link import MAX_BYTES, Kind, Link
from shared.parallel.sharding import Shard
from shared.transport.pool_memory import PoolMemory


@pytest.fixture
def links() -> Iterator[tuple[Link, Link]]:
    here, there = map(Link, socket.socketpair())
    yield here, there
    here.close()
    there.close()


def test_messages_arrive_in_order_and_whole(links: tuple[Link, Link]) -> None:
    here, there = links
    body = os.urandom(3 << 20)
    sending = threading.Thread(target=lambda: (here.send(Kind.FORWARD, body), here.send(Kind.STOP)))
    sending.start()
    assert there.receive() == (Kind.FORWARD, body)
    assert there.receive() == (Kind.STOP, b"")
    sending.join()


def test_an_end_a_silence_and_an_excess_are_told_apart(links: tuple[Link, Link]) -> None:
    here, there = links
    with pytest.raises(TimeoutError):
        there.receive(0.01)
    with pytest.raises(ValueError, match="longer than"):
        here.send(Kind.FORWARD, bytes(MAX_BYTES + 1))
    here._connection.sendall(b"\x04\xff\xff\xff\xff")
    with pytest.raises(ValueError, match="4294967295 bytes is longer"):
        there.receive()
    here._connection.sendall(b"\x09\0\0\0\0")
    with pytest.raises(ValueError, match="9 is not a valid Kind"):
        there.receive()
    here.close()
    with pytest.raises(EOFError):
        there.receive()
    with pytest.raises(EOFError):
        there.send(Kind.DONE)


def told(model: Path | str) -> dict[str, Any]:
    config = TandemConfig(model=str(model), dtype="float32", threads=1, decode={"num_blocks": 8})  # pyright: ignore[reportArgumentType]
    return {"config": config.model_dump(mode="json", exclude={"gateway", "auth", "up"}), "role": "decode"}


def of(memory: PoolMemory) -> RankMemory:
    return RankMemory(memory.descriptor, memory.num_bytes)


def start_until_done(followers: Followers) -> None:
    """Mapped, and loaded."""
    for _ in range(2):
        followers.expect(60)


def test_a_rank_that_cannot_start_says_why_and_is_gone(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """No such model; a pool of another size than the plan's; weights that are none."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny_model("llama").iterdir():
        (broken / path.name).write_bytes(b"none" if path.suffix == ".safetensors" else path.read_bytes())
    config = TandemConfig(**told(broken)["config"])
    plan = EnginePlan.of(config, config.decode, ModelStore().resolve(str(broken)), Shard(1, 2))
    small, right = PoolMemory(4096, is_sealed=False), PoolMemory(plan.pool_bytes, is_sealed=False)
    cases = {
        "rank 1: ModelNotFoundError: .*/nowhere": Followers.start(told("/nowhere"), [of(small)]),
        r"rank 1: OSError: the pool's memory has 4096 bytes, not": Followers.start(told(broken), [of(small)]),
        r"rank 1: CheckpointError: .*model\.safetensors": Followers.start(told(broken), [of(right)]),
    }
    try:
        for message, followers in cases.items():
            with pytest.raises(GroupError, match=message):
                start_until_done(followers)
            with pytest.raises(GroupError, match="rank 1 ended with status 1"):
                followers.expect(60)
    finally:
        for followers in cases.values():
            followers.stop()
    small.close()
    right.close()


def test_a_killed_rank_is_named_with_its_signal(tiny_model: Callable[[str], Path]) -> None:
    memory = PoolMemory(4096, is_sealed=False)
    followers = Followers.start(told(tiny_model("llama")), [of(memory), of(memory)])
    followers._followers[1].process.kill()
    followers._followers[0].process.send_signal(signal.SIGSTOP)
    with pytest.raises(GroupError, match=r"rank 1 did not answer in 0\.1 s"):
        followers.expect(0.1)
    followers._followers[0].process.kill()
    for rank, follower in enumerate(followers._followers, 1):
        assert str(follower.ended()) == f"rank {rank} ended with SIGKILL"
    followers.stop()
    memory.close()
