"""A decode worker's KV side as a process of its own, which maps a pool and then copies out of it again and again.

Its argument is JSON: layout, num_blocks, on (which device its pool is on; null: the host), and an extent as protobuf's
JSON. After each copy it prints the CRC-32 of what is there, and it goes on until it is killed.
"""

import asyncio
import json
import sys
import zlib
from types import SimpleNamespace

import torch
from google.protobuf.json_format import ParseDict
from tandem.v1 import kv_pb2

from shared.config import TransportConfig
from shared.kv_cache import KvLayout
from shared.transport.device_pool import DevicePool
from shared.transport.importer import Importer
from shared.transport.target import DeviceTarget, HostTarget
from tests.shared.transport.cuda_devices import make_cuda, read


async def main(options: SimpleNamespace) -> None:
    layout = KvLayout(**options.layout)
    num_bytes = options.num_blocks * layout.block_bytes
    if options.on is not None:
        device = DevicePool(make_cuda(options.on), num_bytes)
        device.settle(device.mark())
        pool, target = device.tensor, DeviceTarget(layout, device)
    else:
        memory = bytearray(num_bytes)
        pool, target = torch.frombuffer(memory, dtype=torch.uint8), HostTarget(layout, memory)
    importer = Importer([target], worker_id="decode-1", config=TransportConfig())
    extent = ParseDict(options.extent, kv_pb2.KvExtent())
    while True:
        blocks = range(1, len(extent.block_ids) + 1)
        await importer.copy(extent, blocks)
        print(zlib.crc32(read(pool)[layout.block_bytes : (blocks[-1] + 1) * layout.block_bytes]), flush=True)


asyncio.run(main(SimpleNamespace(**json.loads(sys.argv[1]))))
