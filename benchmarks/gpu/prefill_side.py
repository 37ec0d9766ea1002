"""A prefill worker's KV side as a process of its own: a pool of random bytes on the device, exported whole as "all".

    python -m benchmarks.gpu.prefill_side '{"layout": {...}, "num_blocks": 257, "export": "descriptor"}'

It prints one line of JSON when it serves, and stops at the end of its standard input.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from typing import Any

import torch
from tandem.v1 import kv_pb2_grpc
from torch import Tensor

from benchmarks.gpu.shapes import device
from shared.config import TransportConfig
from shared.kv_cache import KvLayout
from shared.rpc import create_server
from shared.transport.cuda import COMPUTE, CudaDriver
from shared.transport.device_pool import DevicePool
from shared.transport.exporter import Exporter
from shared.transport.pool import Pool
from shared.transport.pool_memory import PoolMemory

EXPORT_ID = "all"


def make_driver() -> CudaDriver:
    """Of this process's device; where there is none, one of memory files, as tests have it."""
    if torch.cuda.is_available():
        return CudaDriver(torch.cuda.current_device())
    return importlib.import_module("tests.shared.transport.fake_cuda").FakeCuda()


def contents(num_bytes: int) -> Tensor:
    """uint8 [num_bytes] on the device, the same in every process."""
    generator = torch.Generator(device()).manual_seed(0)
    return torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device(), generator=generator)


async def serve(options: dict[str, Any]) -> None:
    layout = KvLayout(**options["layout"])
    memory = PoolMemory(options["num_blocks"] * layout.block_bytes, populate=False)
    pool = DevicePool(make_driver(), memory.num_bytes, export=options["export"])
    numbers = contents(memory.num_bytes)
    if torch.cuda.is_available():
        torch.cuda.synchronize()

    def fill() -> None:
        pool.tensor.copy_(numbers)

    pool.driver.run(COMPUTE, fill)
    mark = pool.mark()
    server = create_server()
    endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    config = TransportConfig(require="cuda_ipc")
    exported = Pool(layout, memory, pool)
    exporter = Exporter([exported], worker_id="prefill", kv_endpoint=endpoint, config=config)
    await exporter.start()
    exporter.open_export(EXPORT_ID, range(1, options["num_blocks"]))
    kv_pb2_grpc.add_KvServiceServicer_to_server(exporter, server)
    await server.start()
    print(json.dumps({"kv_endpoint": endpoint, "epoch": exporter.epoch, "mark": mark}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await exporter.release()
    exporter.close()
    await server.stop(0)
    pool.close()
    memory.close()


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
