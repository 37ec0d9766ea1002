"""Writing to a stream that has ended: nothing is lost of what it said, and nothing of the call stays."""

import asyncio

import grpc
import pytest
from tandem.v1 import decode_pb2, decode_pb2_grpc

from gateway.failure import DecodeFailed, read, write

IMPORTED = 20


class Ends(decode_pb2_grpc.DecodeServiceServicer):
    """Says a number of things, reads one message, and ends with an error."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def Decode(self, request_iterator, context):
        await context.read()
        for attempt in range(IMPORTED):
            await context.write(decode_pb2.DecodeResponse(imported=decode_pb2.Imported(attempt=attempt)))
        self.ended.set()
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no more of it")


@pytest.mark.parametrize("reads_meanwhile", [False, True])
async def test_a_stream_that_ended_while_it_was_written_to(reads_meanwhile: bool) -> None:
    server, servicer = grpc.aio.server(), Ends()
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    heard = []

    async def hear(call) -> None:
        while True:
            heard.append((await read(call, "d-1", DecodeFailed)).imported.attempt)

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await channel.channel_ready()
        before = asyncio.all_tasks()
        call = decode_pb2_grpc.DecodeServiceStub(channel).Decode()
        await write(call, decode_pb2.DecodeRequest())
        hearing = asyncio.create_task(hear(call)) if reads_meanwhile else None
        await servicer.ended.wait()
        for _ in range(200):  # the last ones find the stream ended
            await write(call, decode_pb2.DecodeRequest())
        with pytest.raises(DecodeFailed) as failed:
            await (hearing or hear(call))
        assert heard == list(range(IMPORTED))
        assert failed.value.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        call.cancel()
        async with asyncio.timeout(10):  # the server's tasks are replaced, so they are counted
            while len(left := asyncio.all_tasks()) > len(before):
                await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
    await server.stop(None)
