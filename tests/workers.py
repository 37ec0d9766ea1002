"""Workers in the test's own process, and a client that plays the gateway's part over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import grpc
from tandem.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    kv_pb2,
    prefill_pb2,
    prefill_pb2_grpc,
    types_pb2,
    worker_pb2,
    worker_pb2_grpc,
)

import decode_worker.service
import prefill_worker.service
from shared.config import load_config
from shared.rpc import connect
from shared.worker import WorkerServer

SETTLE_S = 20.0


def sampling(**values: Any) -> types_pb2.SamplingParams:
    """Resolved parameters: greedy, 8 tokens, past every end, unless said otherwise."""
    resolved: dict[str, Any] = {
        "max_tokens": 8,
        "min_tokens": 0,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": 7,
        "n": 1,
        "ignore_eos": True,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
    }
    return types_pb2.SamplingParams(**{**resolved, **values})


@asynccontextmanager
async def running_worker(
    role: Literal["prefill", "decode"], model: Path, **settings: Any
) -> AsyncIterator[tuple[WorkerServer, grpc.aio.Channel]]:
    """settings: of the role's section, `transport` apart; the pool has 64 blocks of 16 tokens unless said otherwise."""
    transport = settings.pop("transport", {})
    section = {"port": 0, "num_blocks": 64, **settings}
    values = {"model": str(model), "dtype": "float32", "threads": 2, role: section, "transport": transport}
    config = load_config(None, values)
    if role == "prefill":
        worker = await WorkerServer.start(config, config.prefill, prefill_worker.service.create_role)
    else:
        worker = await WorkerServer.start(config, config.decode, decode_worker.service.create_role)
    channel = connect(worker.address)
    try:
        yield worker, channel
    finally:
        await channel.close()
        await worker.stop(drain_s=5)


async def load(channel: grpc.aio.Channel) -> worker_pb2.WatchLoadResponse:
    """The load now."""
    call = worker_pb2_grpc.WorkerServiceStub(channel).WatchLoad(worker_pb2.WatchLoadRequest())
    try:
        return await call.read()
    finally:
        call.cancel()


async def settled(channel: grpc.aio.Channel) -> worker_pb2.WatchLoadResponse:
    """The load once nothing runs, waits or holds a block; asserts that this comes without further traffic."""
    call = worker_pb2_grpc.WorkerServiceStub(channel).WatchLoad(worker_pb2.WatchLoadRequest(interval_s=0.01))
    try:
        async with asyncio.timeout(SETTLE_S):
            while True:
                seen = await call.read()
                if not (seen.running or seen.waiting or seen.allocated_blocks or seen.exports or seen.queued_tokens):
                    assert seen.free_blocks == seen.total_blocks
                    return seen
    finally:
        call.cancel()


async def until(channel: grpc.aio.Channel, condition: Any) -> worker_pb2.WatchLoadResponse:
    """The first load for which the condition holds."""
    call = worker_pb2_grpc.WorkerServiceStub(channel).WatchLoad(worker_pb2.WatchLoadRequest(interval_s=0.01))
    try:
        async with asyncio.timeout(SETTLE_S):
            while not condition(seen := await call.read()):
                pass
            return seen
    finally:
        call.cancel()


@dataclass
class Output:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[types_pb2.PositionLogprobs] = field(default_factory=list)
    finish_reason: int = 0

    def add(self, position: int, token_ids: Iterable[int], logprobs: Iterable[Any], finish_reason: int) -> None:
        assert not self.finish_reason, "an output goes on after its end"
        assert position == len(self.token_ids), f"a gap or a repeat at {position}"
        self.token_ids.extend(token_ids)
        self.logprobs.extend(logprobs)
        self.finish_reason = finish_reason


def _bytes(reports: list[types_pb2.PositionLogprobs]) -> list[bytes]:
    return [report.SerializeToString() for report in reports]


@dataclass
class Result:
    outputs: dict[int, Output] = field(default_factory=dict)
    prompt_logprobs: list[types_pb2.PositionLogprobs] = field(default_factory=list)
    reserved: decode_pb2.Reserved = field(default_factory=decode_pb2.Reserved)
    imported: decode_pb2.Imported | None = None
    first_tokens: prefill_pb2.FirstTokens | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    messages: int = 0

    @property
    def bits(self) -> Any:
        """All that must not depend on how the request was served."""
        return (
            {
                i: (o.token_ids, [p.SerializeToString() for p in o.logprobs], o.finish_reason)
                for i, o in self.outputs.items()
            },
            [p.SerializeToString() for p in self.prompt_logprobs],
        )


@dataclass
class Request:
    token_ids: list[int]
    params: types_pb2.SamplingParams
    num_prompt_tokens: int | None = None
    priority: int = 0
    cache_salt: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        """As Admit and PrefillRequest both have them."""
        return {
            "token_ids": self.token_ids,
            "num_prompt_tokens": self.num_prompt_tokens or len(self.token_ids),
            "sampling": self.params,
            "output_indices": range(self.params.n),
            "priority": self.priority,
            "cache_salt": self.cache_salt,
        }


class DecodeCall:
    """One Decode stream."""

    def __init__(self, channel: grpc.aio.Channel, request: Request) -> None:
        self.call = decode_pb2_grpc.DecodeServiceStub(channel).Decode()
        self.request = request

    async def admit(self) -> decode_pb2.Reserved:
        await self.call.write(decode_pb2.DecodeRequest(admit=decode_pb2.Admit(**self.request.fields)))
        message = await self.read()
        assert message is not None
        assert message.HasField("reserved"), message
        return message.reserved

    async def import_blocks(self, attempt: int, extent: kv_pb2.KvExtent) -> None:
        message = decode_pb2.ImportBlocks(attempt=attempt, extent=extent)
        await self.call.write(decode_pb2.DecodeRequest(import_blocks=message))

    async def begin(
        self, attempt: int, first_tokens: Iterable[prefill_pb2.FirstToken] = (), local_prefill: bool = False
    ) -> None:
        message = decode_pb2.Begin(attempt=attempt, first_tokens=first_tokens, local_prefill=local_prefill)
        await self.call.write(decode_pb2.DecodeRequest(begin=message))

    async def finish(self, *indices: int) -> None:
        message = decode_pb2.Finish(output_indices=indices)
        await self.call.write(decode_pb2.DecodeRequest(finish=message))

    async def read(self) -> decode_pb2.DecodeResponse | None:
        """None at the stream's end; an error raises."""
        message = await self.call.read()
        if message is grpc.aio.EOF:
            code = await self.call.code()
            assert code == grpc.StatusCode.OK, (code, await self.call.details())
            return None
        return message


class PrefillCall:
    """One Prefill stream."""

    def __init__(self, channel: grpc.aio.Channel, request: Request, skip_tokens: int = 0, attempt: int = 1) -> None:
        self.call = prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(
            prefill_pb2.PrefillRequest(**request.fields, skip_tokens=skip_tokens, attempt=attempt)
        )
        self.extents: list[kv_pb2.KvExtent] = []

    async def next_extent(self) -> kv_pb2.KvExtent | None:
        """None once the first tokens are there."""
        message = await self.call.read()
        assert message is not grpc.aio.EOF, await self.call.details()
        if message.HasField("extent"):
            self.extents.append(message.extent)
            return message.extent
        self.first_tokens = message.first_tokens
        return None

    async def finish(self) -> prefill_pb2.FirstTokens:
        while await self.next_extent():
            pass
        return self.first_tokens


async def hand_over(decode: DecodeCall, prefill: grpc.aio.Channel, result: Result, *, attempt: int = 1) -> PrefillCall:
    """Prefill to Begin. The prefill stream is still open then."""
    call = PrefillCall(prefill, decode.request, result.reserved.held_tokens, attempt)
    while extent := await call.next_extent():
        await decode.import_blocks(attempt, extent)
    result.first_tokens = call.first_tokens
    result.prompt_logprobs = list(call.first_tokens.prompt_logprobs)
    for token in call.first_tokens.tokens:
        result.outputs[token.index] = Output()
        logprobs = [token.logprobs] if token.HasField("logprobs") else []
        result.outputs[token.index].add(0, [token.token_id], logprobs, token.finish_reason)
    going = [token for token in call.first_tokens.tokens if not token.finish_reason]
    if going:
        await decode.begin(attempt, going)
    else:
        await decode.finish(*range(decode.request.params.n))
    return call


async def receive(decode: DecodeCall, result: Result, prefill: PrefillCall | None = None) -> Result:
    """The rest of a Decode stream; ends the prefill's once everything is imported."""
    while message := await decode.read():
        if message.HasField("imported"):
            result.imported = message.imported
            assert prefill is not None
            prefill.call.cancel()
            continue
        result.messages += 1
        result.cached_tokens = message.tokens.cached_tokens
        result.preemptions = message.tokens.preemptions
        result.prompt_logprobs.extend(message.tokens.prompt_logprobs)
        for new in message.tokens.outputs:
            output = result.outputs.setdefault(new.index, Output())
            output.add(new.position, new.token_ids, new.logprobs, new.finish_reason)
    if prefill is not None:
        prefill.call.cancel()
    return result


async def generate(prefill: grpc.aio.Channel | None, decode: grpc.aio.Channel, request: Request) -> Result:
    """Serves a request as the gateway does; prefill None = the decode worker prefills."""
    call = DecodeCall(decode, request)
    result = Result(reserved=await call.admit())
    if prefill is None:
        await call.begin(1, local_prefill=True)
        return await receive(call, result)
    return await receive(call, result, await hand_over(call, prefill, result))
