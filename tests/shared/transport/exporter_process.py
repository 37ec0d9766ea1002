"""A prefill worker's KV side as a process of its own: a pool of random bytes, exported whole as "all".

Its argument is JSON: layout, num_blocks, seed, host, port, export, on, config. It prints one line of JSON when it
serves, and stops at the end of its standard input. At a line "compute" there it has its device compute for ever, or for
long, and prints the mark by which that is done.
"""

import asyncio
import json
import random
import sys
from types import SimpleNamespace

import torch
from tandem.v1 import kv_pb2_grpc

from shared.config import TransportConfig
from shared.kv_cache import KvLayout
from shared.rpc import create_server
from shared.transport.device_pool import DevicePool
from shared.transport.exporter import Exporter
from shared.transport.pool import Pool
from shared.transport.pool_memory import PoolMemory
from tests.shared.transport.cuda_devices import make_cuda, write
from tests.shared.transport.fake_cuda import FakeCuda

LONG = 100_000_000_000  # cycles of a GPU: a minute


async def main(options: SimpleNamespace) -> None:
    layout = KvLayout(**options.layout)
    memory = PoolMemory(options.num_blocks * layout.block_bytes)
    contents = random.Random(options.seed).randbytes(memory.num_bytes)
    device = None
    if options.export is not None:
        device = DevicePool(make_cuda(options.on), memory.num_bytes, export=options.export)
        device.settle(device.mark())
    write(memory.tensor if device is None else device.tensor, contents)
    server = create_server()
    endpoint = f"{options.host}:{server.add_insecure_port(f'{options.host}:{options.port}')}"
    exporter = Exporter(
        [Pool(layout, memory, device)],
        worker_id=f"seed-{options.seed}",
        kv_endpoint=endpoint,
        config=TransportConfig(**options.config),
    )
    await exporter.start()
    exporter.open_export("all", range(1, options.num_blocks))
    kv_pb2_grpc.add_KvServiceServicer_to_server(exporter, server)
    await server.start()
    print(json.dumps({"kv_endpoint": endpoint, "epoch": exporter.epoch}), flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        assert device is not None
        if isinstance(device.driver, FakeCuda):
            device.driver.gate()
        else:
            torch.cuda._sleep(LONG)
        print(json.dumps({"mark": device.mark()}), flush=True)
    exporter.close()
    await server.stop(0)
    if device is not None:
        device.close()
    memory.close()


asyncio.run(main(SimpleNamespace(**json.loads(sys.argv[1]))))
