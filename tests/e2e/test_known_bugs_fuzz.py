"""Nothing from the wire reaches an assertion: each RPC of every service gets random and mutated messages.

vLLM #51505: a request with several prompts crashed the decode worker. Here no message may be answered INTERNAL or
UNKNOWN, end a process, or leave a block behind.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from tandem.v1 import decode_pb2, inference_pb2, kv_pb2, prefill_pb2, types_pb2, worker_pb2

from tests.cluster import Cluster
from tests.e2e.faults import ask, failure, prompt
from tests.tiny_encoders import tiny_encoder
from tests.workers import sampling

Code = grpc.StatusCode
# of each RPC; each has a seed of its own, so the slow ones are others
CASES = [pytest.param(range(150), id="150"), pytest.param(range(150, 600), id="450 more", marks=pytest.mark.slow)]
AT_ONCE = 12
# what a client may be told; its own deadline and cancellation among it
TOLD = {
    Code.OK,
    Code.INVALID_ARGUMENT,
    Code.NOT_FOUND,
    Code.FAILED_PRECONDITION,
    Code.ABORTED,
    Code.RESOURCE_EXHAUSTED,
    Code.UNAVAILABLE,
    Code.DEADLINE_EXCEEDED,
    Code.CANCELLED,
}
INTEGERS = {
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_FIXED32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
}
NUMBERS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-300, 1e300, math.inf, -math.inf, math.nan)
TEXTS = ("", "x", "127.0.0.1:1", "a:b:c", "\x00", "é🚀", "../../etc/passwd", "A" * 5000, "{{ x }}", "<|im_end|>")


def value(field: FieldDescriptor, rng: random.Random, depth: int) -> Any:
    """Any value of a field's type, at its edges more often than between them."""
    if field.message_type is not None:
        return message(GetMessageClass(field.message_type), rng, depth + 1)
    if field.enum_type is not None:
        return rng.choice([0, 1, 2, 3, 4, 99, -1])
    if field.type in INTEGERS:
        low, high = INTEGERS[field.type]
        return rng.choice([0, 1, 2, 15, 16, 17, 100, low, high, high - 1, rng.randint(low, high), rng.randrange(400)])
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return rng.choice([*NUMBERS, rng.uniform(-3, 3)])
    if field.type == FieldDescriptor.TYPE_BOOL:
        return rng.random() < 0.5
    text = rng.choice(TEXTS)
    return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text


def put(target: Message, field: FieldDescriptor, rng: random.Random, depth: int) -> None:
    """Gives one field of a message another value, or none."""
    target.ClearField(field.name)
    if rng.random() < 0.15:
        return
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, val = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
        for _ in range(rng.choice([1, 3])):
            getattr(target, field.name)[value(key, rng, depth)] = value(val, rng, depth)
    elif field.is_repeated:
        count = rng.choice([1, 1, 2, 5, 300])
        getattr(target, field.name).extend(value(field, rng, depth) for _ in range(count if depth < 2 else 1))
    elif field.message_type is not None:
        getattr(target, field.name).CopyFrom(value(field, rng, depth))
    else:
        setattr(target, field.name, value(field, rng, depth))


def message(kind: type[Message], rng: random.Random, depth: int = 0) -> Message:
    """A random message."""
    made = kind()
    for field in kind.DESCRIPTOR.fields:
        if depth < 4 and rng.random() < 0.4:
            put(made, field, rng, depth)
    return made


def parts(whole: Message) -> Iterator[Message]:
    """The message, and every message in it."""
    yield whole
    for field, content in whole.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for part in content if field.is_repeated else [content]:
            yield from parts(part)


def mutated(valid: Message, rng: random.Random) -> Message:
    """A message that is right but for one to three fields."""
    copy = type(valid)()
    copy.CopyFrom(valid)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        part = rng.choice(list(parts(copy)))
        if part.DESCRIPTOR.fields:
            put(part, rng.choice(part.DESCRIPTOR.fields), rng, depth=2)
    return copy


@pytest.fixture(scope="module")
async def service(tiny_model: Callable[[str], Path]) -> AsyncIterator[Cluster]:
    settings = {
        "dtype": "float32",
        "max_context": 256,
        "prefill.num_blocks": 64,
        "decode.num_blocks": 64,
        "gateway.resume_window_s": 0.5,
    }
    async with Cluster(model=str(tiny_model("llama")), settings=settings) as cluster:
        yield cluster


@pytest.fixture(scope="module")
async def embedder() -> AsyncIterator[Cluster]:
    async with Cluster(model=str(tiny_encoder()), prefill=1, decode=0, settings={"dtype": "float32"}) as cluster:
        yield cluster


def valid_messages(info: worker_pb2.GetInfoResponse, rng: random.Random) -> dict[str, list[Message]]:
    """For each method, requests that are right; for Decode, the messages of a whole stream."""
    token_ids = prompt(rng.choice((5, 16, 40)), rng.randrange(100))
    resolved = sampling(max_tokens=6, logprobs=1, n=rng.choice((1, 2)))
    common: dict[str, Any] = {
        "token_ids": token_ids,
        "num_prompt_tokens": len(token_ids),
        "sampling": resolved,
        "output_indices": range(resolved.n),
    }
    chat = inference_pb2.ChatMessages(messages=[inference_pb2.ChatMessage(role="user", content="Hello")])
    # of a model that embeds there is no layout
    blocks = range(1, 1 + -(-len(token_ids) // (info.layout.block_tokens or 16)))
    extent = kv_pb2.KvExtent(
        kv_endpoint=info.kv_endpoint,
        epoch=info.epoch,
        layout_digest=info.layout.digest,
        block_ids=blocks,
        num_tokens=len(token_ids),
        export_id="x",
    )
    first_tokens = [prefill_pb2.FirstToken(index=i, token_id=7) for i in range(resolved.n)]
    transports = [types_pb2.TRANSPORT_SHARED_MEMORY, types_pb2.TRANSPORT_INLINE]
    request_id = f"fuzz {rng.randrange(5)}"
    begin = rng.choice(
        [decode_pb2.Begin(attempt=1, first_tokens=first_tokens), decode_pb2.Begin(attempt=2, local_prefill=True)]
    )
    return {
        "Generate": [rng.choice([ask(token_ids, request_id, max_tokens=6), ask("Hello", max_tokens=6, n=2)])],
        "Resume": [inference_pb2.ResumeRequest(request_id=request_id)],
        "Tokenize": [inference_pb2.TokenizeRequest(messages=chat)],
        "Detokenize": [inference_pb2.DetokenizeRequest(token_ids=token_ids)],
        "ListModels": [inference_pb2.ListModelsRequest()],
        "Embed": [
            inference_pb2.EmbedRequest(
                inputs=[
                    inference_pb2.EmbedInput(text="Hello"),
                    inference_pb2.EmbedInput(token_ids=inference_pb2.TokenIds(ids=token_ids)),
                ],
                dimensions=8,
            )
        ],
        "Prefill": [prefill_pb2.PrefillRequest(**common, attempt=1)],
        "EmbedTokens": [
            prefill_pb2.EmbedTokensRequest(
                request_id=request_id,
                attempt=1,
                sequences=[prefill_pb2.TokenSequence(token_ids=token_ids)],
                normalize=True,
            )
        ],
        "Decode": [
            decode_pb2.DecodeRequest(admit=decode_pb2.Admit(**common)),
            decode_pb2.DecodeRequest(import_blocks=decode_pb2.ImportBlocks(attempt=1, extent=extent)),
            decode_pb2.DecodeRequest(begin=begin),
            decode_pb2.DecodeRequest(finish=decode_pb2.Finish(output_indices=[0])),
        ],
        "Connect": [decode_pb2.ConnectRequest(kv_endpoint=info.kv_endpoint)],
        "Handshake": [kv_pb2.HandshakeRequest(layout=info.layout, worker_id="d", transports=transports)],
        "Fetch": [kv_pb2.FetchRequest(export_id="x", epoch=info.epoch, block_ids=blocks)],
        "GetInfo": [worker_pb2.GetInfoRequest()],
        "WatchLoad": [worker_pb2.WatchLoadRequest(interval_s=0.05)],
    }


async def outcome(channel: grpc.aio.Channel, method: MethodDescriptor, requests: Sequence[Message]) -> grpc.StatusCode:
    """Makes a call, reads some of its answer, goes away; the status that it came to.

    A client that writes while the server ends the call gets a status of its own making from grpc, in place of the
    server's: whether that was INTERNAL is in the server's log.
    """
    path = f"/{method.containing_service.full_name}/{method.name}"
    codec = {
        "request_serializer": lambda request: request.SerializeToString(),
        "response_deserializer": GetMessageClass(method.output_type).FromString,
    }
    call: Any
    try:
        if method.client_streaming:
            call = channel.stream_stream(path, **codec)(timeout=3)
            for request in requests:
                await call.write(request)
                if request is requests[0]:
                    await call.read()  # a reservation, or the end
        elif method.server_streaming:
            call = channel.unary_stream(path, **codec)(requests[0], timeout=3)
        else:
            await channel.unary_unary(path, **codec)(requests[0], timeout=3)
            return Code.OK
        # these two go on without an end
        for _ in range({"WatchLoad": 1, "Prefill": 2}.get(method.name, 4)):
            if await call.read() is grpc.aio.EOF:
                return await call.code()
        call.cancel()
        return Code.CANCELLED
    except grpc.aio.AioRpcError as error:
        return Code.CANCELLED if error.details() == "Internal error from Core" else error.code()
    except asyncio.InvalidStateError:  # written after its end
        return await call.code()


def services() -> list[tuple[str, ServiceDescriptor]]:
    files = {
        "gateway": (inference_pb2,),
        "prefill": (prefill_pb2, kv_pb2, worker_pb2),
        "decode": (decode_pb2, worker_pb2),
    }
    return [
        (who, found)
        for who, modules in files.items()
        for module in modules
        for found in module.DESCRIPTOR.services_by_name.values()
    ]


# draining is what Drain is for
METHODS = [
    pytest.param(who, method, id=f"{who} {method.name}")
    for who, found in services()
    for method in found.methods
    if method.name != "Drain"
]


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize(("who", "method"), METHODS)
async def test_any_message(service: Cluster, who: str, method: MethodDescriptor, cases: range) -> None:
    member = {"gateway": service.gateway, "prefill": service.prefill[0], "decode": service.decode[0]}[who]
    pids = [m.pid for m in service.members]
    seen = len(service.log)
    probe = ask(prompt(30), max_tokens=4)
    expected = await service.generate(probe)
    info = await service.info(service.prefill[0])
    gate = asyncio.Semaphore(AT_ONCE)
    kind = GetMessageClass(method.input_type)

    async def one(number: int) -> None:
        rng = random.Random(f"{who} {method.name} {number}")
        valid = valid_messages(info, rng)[method.name]
        requests = [mutated(request, rng) for request in valid]
        if number % 3 == 0:
            requests = [message(kind, rng) for _ in valid]
        elif number % 5 == 0:
            rng.shuffle(requests)
        async with gate:
            code = await outcome(service.channel(member.grpc), method, requests)
        assert code in TOLD, f"case {number}: {code} for {requests}"

    await asyncio.gather(*(one(number) for number in cases))
    await service.settled()
    assert [m.pid for m in service.members if m.alive] == pids
    assert not [line for line in service.log[seen:] if "incident" in line or "Traceback" in line]
    assert (await service.generate(probe)).outputs == expected.outputs


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize(
    ("who", "method"), [one for one in METHODS if one.values[1].name in ("Embed", "EmbedTokens", "Tokenize")]
)
async def test_any_message_to_what_embeds(embedder: Cluster, who: str, method: MethodDescriptor, cases: range) -> None:
    member = {"gateway": embedder.gateway, "prefill": embedder.prefill[0]}[who]
    pids = [m.pid for m in embedder.members]
    seen = len(embedder.log)
    probe = inference_pb2.EmbedRequest(inputs=[inference_pb2.EmbedInput(text="Paris is the capital of France.")])
    expected = (await embedder.stub.Embed(probe)).embeddings
    info = await embedder.info(embedder.prefill[0])
    gate = asyncio.Semaphore(AT_ONCE)
    kind = GetMessageClass(method.input_type)
    codes = set[grpc.StatusCode]()

    async def one(number: int) -> None:
        rng = random.Random(f"{who} {method.name} {number}")
        request = message(kind, rng) if number % 3 == 0 else mutated(valid_messages(info, rng)[method.name][0], rng)
        async with gate:
            code = await outcome(embedder.channel(member.grpc), method, [request])
        codes.add(code)
        assert code in TOLD, f"case {number}: {code} for {request}"

    await asyncio.gather(*(one(number) for number in cases))
    assert {Code.OK, Code.INVALID_ARGUMENT} <= codes
    assert [m.pid for m in embedder.members if m.alive] == pids
    assert not [line for line in embedder.log[seen:] if "incident" in line or "Traceback" in line]
    assert (await embedder.stub.Embed(probe)).embeddings == expected


async def test_an_error_that_quotes_much(service: Cluster) -> None:
    """What a client cannot mend by waiting must not reach it as RESOURCE_EXHAUSTED for its metadata's size."""
    name = "A" * 20_000
    for call in (
        service.stub.Detokenize(inference_pb2.DetokenizeRequest(model=name, token_ids=[5])),
        service.stub.Tokenize(inference_pb2.TokenizeRequest(model=name, text="x")),
        service.stub.Generate(inference_pb2.GenerateRequest(model=name, text="x")),
        service.stub.Resume(inference_pb2.ResumeRequest(request_id=name)),
    ):
        assert (await failure(call)).code == Code.NOT_FOUND


@pytest.mark.parametrize(("who", "method"), METHODS)
async def test_bytes_that_are_no_message(service: Cluster, who: str, method: MethodDescriptor) -> None:
    """The layer below answers these; the process lives on."""
    member = {"gateway": service.gateway, "prefill": service.prefill[0], "decode": service.decode[0]}[who]
    path = f"/{method.containing_service.full_name}/{method.name}"
    rng = random.Random(path)
    for number in range(6):
        noise = b"\xff" * 10 + rng.randbytes(rng.choice((1, 50, 5000)))
        call = service.channel(member.grpc).stream_stream(path)(timeout=5)
        try:
            await call.write(noise)
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
            code = await call.code()
        except grpc.aio.AioRpcError as error:
            code = error.code()
        except asyncio.InvalidStateError:
            code = await call.code()
        assert code not in (Code.OK, Code.DEADLINE_EXCEEDED), f"{number}: {code}"
    assert member.alive
    await service.settled()
