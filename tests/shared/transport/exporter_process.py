"""A prefill worker's KV side as a process of its own: a pool of random bytes, exported whole as "all".

Its argument is JSON: layout, num_blocks, seed, host, port, export, config. It prints one line of JSON when it serves,
and stops at the end of its standard input.
"""

import asyncio
import json
import random
import sys
from types import SimpleNamespace

from tandem.v1 import kv_pb2_grpc

from shared.config import TransportConfig
from shared.kv_cache import KvLayout
from shared.rpc import create_server
from shared.transport.device_pool import DevicePool
from shared.transport.exporter import Exporter
from shared.transport.pool_memory import PoolMemory
from tests.shared.transport.fake_cuda import FakeCuda


async def main(options: SimpleNamespace) -> None:
    layout = KvLayout(**options.layout)
    memory = PoolMemory(options.num_blocks * layout.block_bytes)
    contents = random.Random(options.seed).randbytes(memory.num_bytes)
    device = None
    if options.export is None:
        memory.buffer[:] = contents
    else:
        device = DevicePool(FakeCuda(), memory.num_bytes, export=options.export)
        device.settle(device.mark())
        memoryview(device.tensor.numpy())[:] = contents
    server = create_server()
    endpoint = f"{options.host}:{server.add_insecure_port(f'{options.host}:{options.port}')}"
    exporter = Exporter(
        layout,
        memory,
        worker_id=f"seed-{options.seed}",
        kv_endpoint=endpoint,
        config=TransportConfig(**options.config),
        device=device,
    )
    await exporter.start()
    exporter.open_export("all", range(1, options.num_blocks))
    kv_pb2_grpc.add_KvServiceServicer_to_server(exporter, server)
    await server.start()
    print(json.dumps({"kv_endpoint": endpoint, "epoch": exporter.epoch}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    exporter.close()
    await server.stop(0)
    if device is not None:
        device.close()
    memory.close()


asyncio.run(main(SimpleNamespace(**json.loads(sys.argv[1]))))
