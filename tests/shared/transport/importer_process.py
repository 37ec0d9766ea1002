"""A decode worker's KV side as a process of its own, which maps a pool and then copies out of it again and again.

Its argument is JSON: layout, num_blocks, on_device, and an extent as protobuf's JSON. It prints "copied" once the
first copy is there, and goes on until it is killed.
"""

import asyncio
import json
import sys
from types import SimpleNamespace

from google.protobuf.json_format import ParseDict
from tandem.v1 import kv_pb2

from shared.config import TransportConfig
from shared.kv_cache import KvLayout
from shared.transport.device_pool import DevicePool
from shared.transport.importer import Importer
from shared.transport.target import DeviceTarget, HostTarget
from tests.shared.transport.fake_cuda import FakeCuda


async def main(options: SimpleNamespace) -> None:
    layout = KvLayout(**options.layout)
    num_bytes = options.num_blocks * layout.block_bytes
    if options.on_device:
        target = DeviceTarget(layout, DevicePool(FakeCuda(), num_bytes))
    else:
        target = HostTarget(layout, bytearray(num_bytes))
    importer = Importer(target, worker_id="decode-1", config=TransportConfig())
    extent = ParseDict(options.extent, kv_pb2.KvExtent())
    while True:
        await importer.copy(extent, range(1, len(extent.block_ids) + 1))
        print("copied", flush=True)


asyncio.run(main(SimpleNamespace(**json.loads(sys.argv[1]))))
