"""A pool in other network, PID, IPC and user namespaces: copied as fast as a neighbour's, if its socket can be seen."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tandem.v1 import types_pb2

from tests.namespaces import Network, in_the_way

HOST, PORT = "10.77.0.2", 50061
TURNS = 9


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if reason := in_the_way():
        pytest.skip(f"this host gives us no namespaces: {reason}")
    with Network([f"{HOST}:{PORT}"]) as network:
        yield network


@pytest.fixture
def sockets() -> Iterator[Path]:
    """In the temporary folder itself, of which processes in namespaces see only what they are given."""
    with tempfile.TemporaryDirectory(prefix="tandem-sockets-") as folder:
        yield Path(folder)


@pytest.mark.parametrize("shared", [True, False])
async def test_it_takes_a_folder_that_both_see(start_exporter, importing, layout, network, sockets, shared):
    def enter(command: list[str]) -> list[str]:
        return network.command(HOST, command, folders=[sockets] if shared else [])

    worker = await start_exporter(1, host=HOST, port=PORT, enter=enter, socket_dir=str(sockets))
    worker.kv_endpoint = network.reach(worker.kv_endpoint)
    decode = importing()
    pair = await decode.importer.connect(worker.kv_endpoint)
    assert pair.transport == (types_pb2.TRANSPORT_SHARED_MEMORY if shared else types_pb2.TRANSPORT_INLINE)
    reasons = [refusal.reason for refusal in pair.refusals]
    assert [("No such file" in reason, "transport.socket_dir" in reason) for reason in reasons] == [
        (True, True) for _ in range(not shared)
    ]
    await decode.importer.copy(worker.extent(layout, [3, 1]), [5, 6])
    assert (decode.block(5), decode.block(6)) == (worker.block(layout, 3), worker.block(layout, 1))
    assert decode.untouched(5, 6)
    worker.kill()
    if shared:  # its end shows across namespaces too
        await pair.closed.wait()


async def test_it_is_copied_as_fast_as_a_neighbours(start_exporter, importing, layout, network, sockets):
    """32 MiB by turns from both, as of a prompt of two thousand tokens; of each the turn that nothing else slowed."""
    layout = replace(layout, num_layers=16, num_kv_heads=2, head_dim=64)
    num_blocks = 1 + (32 << 20) // layout.block_bytes
    decode = importing(num_blocks=num_blocks, layout=layout)
    common = {"num_blocks": num_blocks, "layout": layout, "socket_dir": str(sockets)}
    near = await start_exporter(1, **common)
    far = await start_exporter(
        2, host=HOST, port=PORT, enter=lambda command: network.command(HOST, command, folders=[sockets]), **common
    )
    far.kv_endpoint = network.reach(far.kv_endpoint)
    blocks = random.Random(1).sample(range(1, num_blocks), num_blocks - 1)
    seconds: dict[str, list[float]] = {"near": [], "far": []}
    for _ in range(TURNS):
        for name, worker in (("near", near), ("far", far)):
            result = await decode.importer.copy(worker.extent(layout, blocks), range(1, num_blocks))
            assert result.transport == types_pb2.TRANSPORT_SHARED_MEMORY
            assert decode.block(1) == worker.block(layout, blocks[0])
            assert decode.block(num_blocks - 1) == worker.block(layout, blocks[-1])
            seconds[name].append(result.seconds)
    assert min(seconds["near"]) / min(seconds["far"]) >= 0.5, seconds
