import asyncio
import gc
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from tandem.v1 import kv_pb2, kv_pb2_grpc

from shared.config import TransportConfig
from shared.kv_cache import KvLayout
from shared.rpc import create_server
from shared.transport.device_pool import DevicePool, Export
from shared.transport.exporter import Exporter
from shared.transport.importer import COPY_THREADS, CopyResult, Importer
from shared.transport.pool import Pool
from shared.transport.pool_memory import PoolMemory
from shared.transport.target import DeviceTarget, HostTarget
from tests.shared.transport.cuda_devices import Cuda, Gpu, read, write

ROOT = Path(__file__).parents[3]
LAYOUT = KvLayout(model_digest="ab" * 32, dtype="float32", num_layers=2, num_kv_heads=1, head_dim=8, block_tokens=16)


@pytest.fixture
def layout() -> KvLayout:
    return LAYOUT


@pytest.fixture
def held() -> Callable[[], tuple[set[str], int]]:
    """What this process holds: its open files, and how many pools are mapped into it."""
    gc.collect()  # pools of tests before this one are mapped until the tracebacks that reach them are collected

    def files() -> set[str]:
        found = set()
        for fd in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # the listing's own
                found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        return found

    def held() -> tuple[set[str], int]:
        seen = files()
        while seen != (again := files()):  # another thread opens or closes something right now
            seen = again
        maps = Path("/proc/self/maps").read_text().splitlines()
        return seen, sum("tandem-kv" in line or "fake-cuda GPU" in line for line in maps) + Gpu.mapped

    return held


@dataclass
class Served:
    """An exporter on a server of its own, in this process."""

    exporter: Exporter
    memory: PoolMemory
    layout: KvLayout
    kv_endpoint: str
    device: DevicePool | None = None

    @property
    def pool(self) -> memoryview:
        """Its bytes, wherever they are."""
        return self.memory.buffer if self.device is None else read(self.device.tensor)

    def block(self, index: int) -> bytes:
        size = self.layout.block_bytes
        return bytes(self.pool[index * size : (index + 1) * size])


@dataclass
class Importing:
    """An importer and the pool it copies into, filled with 0xEE."""

    importer: Importer
    layout: KvLayout
    memory: bytearray | None = None
    device: DevicePool | None = None

    @property
    def pool(self) -> bytearray | memoryview:
        """Its bytes, wherever they are."""
        if self.memory is not None:
            return self.memory
        assert self.device is not None
        return read(self.device.tensor)

    async def copy(self, extent: kv_pb2.KvExtent, blocks: Sequence[int]) -> CopyResult:
        """Into `blocks`, the extent's alone: what comes before them in the history is in blocks of no matter."""
        before = extent.first_token // self.layout.block_tokens
        return await self.importer.copy(extent, [0] * before + list(blocks))

    def block(self, index: int) -> bytes:
        size = self.layout.block_bytes
        return bytes(self.pool[index * size : (index + 1) * size])

    def untouched(self, *blocks: int) -> bool:
        """Whether every block but these is as at the start."""
        size = self.layout.block_bytes
        return all(self.block(i) == b"\xee" * size for i in range(len(self.pool) // size) if i not in blocks)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def occupy(importing: Any) -> Iterator[Callable[[Importer], threading.Event]]:
    """Keeps all threads of an importer busy until the event is set."""
    gate = threading.Event()

    def occupy(importer: Importer) -> threading.Event:
        for _ in range(COPY_THREADS):
            importer._threads.submit(gate.wait)
        return gate

    yield occupy
    gate.set()  # before the importer is closed, which waits for its threads


@pytest.fixture
def serve(stack: AsyncExitStack, tmp_path: Path) -> Callable[..., Any]:
    async def serve(
        *,
        num_blocks: int = 32,
        layout: KvLayout = LAYOUT,
        cuda: Cuda | None = None,
        export: Export = "descriptor",
        **config: Any,
    ) -> Served:
        """cuda: of the device that its pool is on; default: it is in host memory."""
        memory = PoolMemory(num_blocks * layout.block_bytes)
        stack.callback(memory.close)
        device = None
        if cuda is not None:
            stack.callback(cuda.assert_clean)
            device = DevicePool(cuda, memory.num_bytes, export=export)
            stack.callback(device.close)
            device.settle(device.mark())
        server = create_server()
        endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        transport = TransportConfig(**{"socket_dir": tmp_path, **config})
        pool = Pool(layout, memory, device)
        exporter = Exporter([pool], worker_id="prefill-1", kv_endpoint=endpoint, config=transport)
        served = Served(exporter, memory, layout, endpoint, device)
        write(memory.tensor if device is None else device.tensor, random.Random(1).randbytes(memory.num_bytes))
        await exporter.start()
        kv_pb2_grpc.add_KvServiceServicer_to_server(exporter, server)
        await server.start()
        stack.callback(exporter.close)
        stack.push_async_callback(exporter.release)
        stack.push_async_callback(server.stop, 0)
        return served

    return serve


@pytest.fixture
def importing(stack: AsyncExitStack) -> Callable[..., Importing]:
    def importing(
        *, num_blocks: int = 32, layout: KvLayout = LAYOUT, cuda: Cuda | None = None, **config: Any
    ) -> Importing:
        """cuda: of the device that its pool is on; default: it is in host memory."""
        num_bytes = num_blocks * layout.block_bytes
        device = memory = None
        if cuda is None:
            memory = bytearray(b"\xee") * num_bytes
            target = HostTarget(layout, memory)
        else:
            stack.callback(cuda.assert_clean)
            device = DevicePool(cuda, num_bytes)
            stack.callback(device.close)
            device.settle(device.mark())
            write(device.tensor, b"\xee" * num_bytes)
            target = DeviceTarget(layout, device)
            stack.callback(target.close)
        importer = Importer([target], worker_id="decode-1", config=TransportConfig(**config))
        stack.push_async_callback(importer.close)
        return Importing(importer, layout, memory, device)

    return importing


@dataclass
class ExporterProcess:
    """exporter_process.py, running."""

    process: subprocess.Popen[str]
    kv_endpoint: str
    epoch: int
    contents: bytes

    async def compute(self) -> int:
        """Has its device compute without an end in sight; the mark by which that is done."""
        self.process.stdin.write("compute\n")
        self.process.stdin.flush()
        return json.loads(await asyncio.to_thread(self.process.stdout.readline))["mark"]

    def extent(self, layout: KvLayout, blocks: list[int], mark: int = 0) -> kv_pb2.KvExtent:
        return kv_pb2.KvExtent(
            kv_endpoint=self.kv_endpoint,
            epoch=self.epoch,
            layout_digest=layout.digest,
            block_ids=blocks,
            num_tokens=len(blocks) * layout.block_tokens,
            export_id="all",
            mark=mark,
        )

    def block(self, layout: KvLayout, index: int) -> bytes:
        return self.contents[index * layout.block_bytes : (index + 1) * layout.block_bytes]

    def kill(self) -> None:
        """SIGKILL. Then nothing of the process is left, its pipes here included."""
        self.process.kill()
        with self.process:
            pass


@pytest.fixture
def start_exporter(stack: AsyncExitStack, tmp_path: Path) -> Callable[..., Any]:
    async def start(
        seed: int,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        num_blocks: int = 32,
        layout: KvLayout = LAYOUT,
        export: Export | None = None,
        on: str = "fake",
        enter: Callable[[list[str]], list[str]] = list,
        **config: Any,
    ) -> ExporterProcess:
        """export: of a pool on a device; default: it is in host memory. on: which device (cuda_devices.py).

        enter: makes the process's command that of one elsewhere (tests/namespaces.py).
        """
        options = {
            "layout": asdict(layout),
            "num_blocks": num_blocks,
            "seed": seed,
            "host": host,
            "port": port,
            "export": export,
            "on": on,
            "config": {"socket_dir": str(tmp_path), **config},
        }
        process = subprocess.Popen(  # noqa: ASYNC220 - forks and execs at once
            enter([sys.executable, str(Path(__file__).with_name("exporter_process.py")), json.dumps(options)]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        stack.enter_context(process)  # closes its pipes, so that it ends, and waits
        ready = json.loads(await asyncio.to_thread(process.stdout.readline))
        contents = random.Random(seed).randbytes(num_blocks * layout.block_bytes)
        return ExporterProcess(process, ready["kv_endpoint"], ready["epoch"], contents)

    return start
