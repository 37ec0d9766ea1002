"""DecodeService over real gRPC with a prefill worker beside it, in the gateway's place."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from tandem.v1 import decode_pb2, decode_pb2_grpc, kv_pb2, prefill_pb2, types_pb2, worker_pb2, worker_pb2_grpc

from shared.rpc import from_grpc
from tests.workers import (
    DecodeCall,
    Output,
    PrefillCall,
    Request,
    Result,
    generate,
    hand_over,
    load,
    receive,
    running_worker,
    sampling,
    settled,
    until,
)

MakeModel = Callable[[str], Path]
Channel = grpc.aio.Channel


@pytest.fixture(scope="module")
async def prefill(tiny_model: MakeModel) -> AsyncIterator[Channel]:
    settings = {"chunk_tokens": 32, "batch_tokens": 64, "num_blocks": 128}
    async with running_worker("prefill", tiny_model("llama"), **settings) as (_, channel):
        yield channel


@pytest.fixture(scope="module")
async def decode(tiny_model: MakeModel) -> AsyncIterator[Channel]:
    async with running_worker("decode", tiny_model("llama"), chunk_tokens=32, num_blocks=128) as (_, channel):
        yield channel


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{length} {seed}")
    return [rng.randrange(3, 380) for _ in range(length)]


async def clear(prefill: Channel, decode: Channel) -> None:
    await settled(prefill)
    await settled(decode)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 48, 100])
async def test_a_prompt_computed_there_or_here_has_the_same_bits(
    prefill: Channel, decode: Channel, length: int
) -> None:
    params = sampling(max_tokens=20, temperature=0.9, seed=length, logprobs=2, n=2)
    request = Request(prompt(length, 1), params, cache_salt="remote")
    remote = await generate(prefill, decode, request)
    assert remote.imported is not None
    assert remote.imported.transport == types_pb2.TRANSPORT_SHARED_MEMORY
    assert remote.imported.handoff_bytes > 0
    request.cache_salt = "local"
    local = await generate(None, decode, request)
    assert local.bits == remote.bits
    assert [len(output.token_ids) for output in local.outputs.values()] == [20, 20]
    # with most of it in decode's own cache
    assert (await generate(None, decode, request)).bits == remote.bits
    cached = await generate(prefill, decode, request)
    assert cached.bits == remote.bits
    assert cached.reserved.held_tokens == (length - 1) // 16 * 16
    await clear(prefill, decode)


async def test_prompt_logprobs_are_the_same_there_and_here(prefill: Channel, decode: Channel) -> None:
    request = Request(prompt(70, 2), sampling(prompt_logprobs=3, logprobs=1))
    remote = await generate(prefill, decode, request)
    local = await generate(None, decode, request)
    assert len(local.prompt_logprobs) == 69
    assert local.bits == remote.bits
    # held blocks would have no logits
    assert (remote.reserved.held_tokens, local.reserved.held_tokens) == (0, 0)


async def test_inline_transport_gives_the_same_bits(prefill: Channel, decode: Channel, tiny_model: MakeModel) -> None:
    request = Request(prompt(60, 3), sampling(max_tokens=12, logprobs=1))
    expected = await generate(prefill, decode, request)
    settings: dict[str, Any] = {"transport": {"disable": ("shared_memory",)}}
    async with running_worker("decode", tiny_model("llama"), **settings) as (_, channel):
        result = await generate(prefill, channel, request)
        assert result.bits == expected.bits
        assert result.imported is not None
        assert result.imported.transport == types_pb2.TRANSPORT_INLINE
        await clear(prefill, channel)


async def test_neighbours_change_nothing(prefill: Channel, decode: Channel) -> None:
    """Mixed parameters, half of the prompts computed here, all at once and each alone."""
    rng = random.Random(4)
    requests = []
    for seed in range(16):
        params = sampling(
            max_tokens=rng.choice((1, 5, 20)),
            temperature=rng.choice((0.0, 0.7, 1.5)),
            top_k=rng.choice((0, 5)),
            top_p=rng.choice((1.0, 0.8)),
            min_p=rng.choice((0.0, 0.1)),
            presence_penalty=rng.choice((0.0, 0.5)),
            stop_token_ids=rng.choice(([], [5, 6, 7])),
            ignore_eos=rng.choice((True, False)),
            n=rng.choice((1, 1, 3)),
            seed=seed,
        )
        if rng.random() < 0.5:
            params.logprobs = rng.choice((0, 4))
        requests.append(Request(prompt(rng.choice((3, 16, 40)), seed), params))
    sources = [rng.choice((prefill, None)) for _ in requests]
    alone = [await generate(source, decode, request) for source, request in zip(sources, requests, strict=True)]
    together = await asyncio.gather(
        *(generate(source, decode, request) for source, request in zip(sources, requests, strict=True))
    )
    assert [result.bits for result in together] == [result.bits for result in alone]
    await clear(prefill, decode)


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
async def test_preemption_changes_nothing(
    prefill: Channel, decode: Channel, tiny_model: MakeModel, preemption: str
) -> None:
    # the four outputs of the last do not fit the small pool even when it is alone
    requests = [
        Request(prompt(20, seed), sampling(max_tokens=40, temperature=1.0, seed=seed, logprobs=1, n=n))
        for seed, n in enumerate((1, 2, 1, 2, 4))
    ]
    roomy = [await generate(prefill, decode, request) for request in requests]
    settings = {"num_blocks": 13, "preemption": preemption}
    async with running_worker("decode", tiny_model("llama"), **settings) as (_, channel):
        tight = await asyncio.gather(*(generate(prefill, channel, request) for request in requests))
        assert [result.bits for result in tight] == [result.bits for result in roomy]
        assert sum(result.preemptions for result in tight) > 0
        await clear(prefill, channel)


# -- the life of a stream ---------------------------------------------------------------------------------------------


async def test_a_cancel_at_any_step_frees_both_pools(prefill: Channel, decode: Channel) -> None:
    for step in range(8):
        call = DecodeCall(decode, Request(prompt(100, 50 + step), sampling(max_tokens=200)))
        source: PrefillCall | None = None
        if step == 0:
            await call.call.write(decode_pb2.DecodeRequest(admit=decode_pb2.Admit(**call.request.fields)))
        else:
            await call.admit()
        if step >= 2:
            source = PrefillCall(prefill, call.request)
            extent = await source.next_extent()
            if step >= 3 and extent:
                await call.import_blocks(1, extent)
            if step >= 4:
                while extent := await source.next_extent():
                    await call.import_blocks(1, extent)
            if step >= 5:
                await call.begin(1, source.first_tokens.tokens)
            if step >= 6:
                message = await call.read()
                assert message is not None
                assert message.HasField("imported")
            if step >= 7:
                assert await call.read()
        call.call.cancel()
        if source:
            source.call.cancel()
        await clear(prefill, decode)


async def test_a_client_that_goes_away_frees_the_blocks(decode: Channel, tiny_model: MakeModel) -> None:
    from shared.rpc import connect

    async with running_worker("decode", tiny_model("llama")) as (worker, channel):
        other = connect(worker.address)
        call = DecodeCall(other, Request(prompt(40), sampling(max_tokens=500)))
        await call.admit()
        await call.begin(1, local_prefill=True)
        assert await call.read()
        await other.close()
        await settled(channel)


async def test_a_deadline_frees_the_blocks(decode: Channel) -> None:
    call = decode_pb2_grpc.DecodeServiceStub(decode).Decode(timeout=0.3)
    fields = Request(prompt(40), sampling()).fields
    await call.write(decode_pb2.DecodeRequest(admit=decode_pb2.Admit(**fields)))
    assert (await call.read()).HasField("reserved")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call.read()
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await settled(decode)


async def test_bursts_of_cancels_leave_nothing_behind(decode: Channel) -> None:
    for burst in range(3):
        calls = [DecodeCall(decode, Request(prompt(40, 100 * burst + i), sampling(max_tokens=50))) for i in range(60)]
        for call in calls:
            await call.call.write(decode_pb2.DecodeRequest(admit=decode_pb2.Admit(**call.request.fields)))
        for call in calls:
            call.call.cancel()
        await settled(decode)
    assert (await generate(None, decode, Request(prompt(20), sampling()))).outputs[0].finish_reason == 2


async def test_a_waiting_request_is_reserved_when_blocks_come_free(tiny_model: MakeModel) -> None:
    async with running_worker("decode", tiny_model("llama"), num_blocks=9, max_waiting=1) as (_, channel):
        held = DecodeCall(channel, Request(prompt(120), sampling()))
        await held.admit()
        waiting = DecodeCall(channel, Request(prompt(40), sampling()))
        reserved = asyncio.ensure_future(waiting.admit())
        await until(channel, lambda seen: seen.waiting == 1)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await DecodeCall(channel, Request(prompt(41), sampling())).admit()
        refused = from_grpc(error.value)
        assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.retry_after_s
        held.call.cancel()
        assert (await reserved).queue_s > 0
        waiting.call.cancel()
        await settled(channel)


async def test_a_pool_full_of_abandoned_requests_recovers_by_itself(tiny_model: MakeModel) -> None:
    async with running_worker("decode", tiny_model("llama"), num_blocks=9) as (_, channel):
        calls = [DecodeCall(channel, Request(prompt(60, i), sampling())) for i in range(6)]
        for call in calls:
            await call.call.write(decode_pb2.DecodeRequest(admit=decode_pb2.Admit(**call.request.fields)))
        await until(channel, lambda seen: seen.waiting == 5)
        for call in calls:
            call.call.cancel()
        await settled(channel)


async def test_finish_ends_outputs_and_with_the_last_the_stream(decode: Channel) -> None:
    call = DecodeCall(decode, Request(prompt(20, 6), sampling(max_tokens=300, n=2, temperature=1.0)))
    result = Result(reserved=await call.admit())
    await call.begin(1, local_prefill=True)
    assert await call.read()
    await call.finish(0)
    await call.finish(1)
    while await call.read():
        pass
    await settled(decode)
    assert result.reserved.worker_id


# -- attempts ---------------------------------------------------------------------------------------------------------


async def test_a_prefill_that_ends_early_is_followed_by_another_attempt(prefill: Channel, decode: Channel) -> None:
    request = Request(prompt(100, 7), sampling(max_tokens=12, logprobs=1))
    expected = await generate(None, decode, Request(request.token_ids, request.params, cache_salt="other"))
    call = DecodeCall(decode, request)
    result = Result(reserved=await call.admit())
    first = PrefillCall(prefill, request)
    extent = await first.next_extent()
    assert extent is not None
    await call.import_blocks(1, extent)
    first.call.cancel()
    await receive(call, result, await hand_over(call, prefill, result, attempt=2))
    assert result.imported is not None
    assert result.imported.attempt == 2
    assert result.bits == expected.bits
    await clear(prefill, decode)


async def test_an_attempt_that_has_begun_can_still_be_voided(prefill: Channel, decode: Channel) -> None:
    request = Request(prompt(50, 8), sampling(max_tokens=100, logprobs=1))
    expected = await generate(None, decode, Request(request.token_ids, request.params, cache_salt="other"))
    call = DecodeCall(decode, request)
    result = Result(reserved=await call.admit())
    first = await hand_over(call, prefill, result)
    while not (message := await call.read()) or not message.HasField("tokens"):
        pass
    second = await hand_over(call, prefill, result, attempt=2)
    # what attempt 1 had under way may still come, and says so
    while message := await call.read():
        if message.HasField("imported"):
            assert message.imported.attempt == 2
            break
        assert message.tokens.attempt == 1
    await receive(call, result, second)
    assert result.bits == expected.bits
    first.call.cancel()
    await clear(prefill, decode)


async def test_what_belongs_to_an_older_attempt_is_ignored(prefill: Channel, decode: Channel) -> None:
    request = Request(prompt(50, 9), sampling(max_tokens=10))
    expected = await generate(None, decode, Request(request.token_ids, request.params, cache_salt="other"))
    call = DecodeCall(decode, request)
    result = Result(reserved=await call.admit())
    stale = PrefillCall(prefill, request)
    await stale.finish()
    third = await hand_over(call, prefill, result, attempt=3)
    await call.import_blocks(2, stale.extents[0])
    await call.begin(2, stale.first_tokens.tokens)
    await receive(call, result, third)
    assert result.bits == expected.bits
    stale.call.cancel()
    await clear(prefill, decode)


async def test_a_stale_epoch_is_aborted_unless_another_attempt_comes(prefill: Channel, decode: Channel) -> None:
    request = Request(prompt(50, 10), sampling(max_tokens=10))
    source = PrefillCall(prefill, request)
    await source.finish()
    source.extents[0].epoch ^= 2
    for recovers in (False, True):
        call = DecodeCall(decode, request)
        result = Result(reserved=await call.admit())
        await call.import_blocks(1, source.extents[0])
        if recovers:
            await receive(call, result, await hand_over(call, prefill, result, attempt=2))
            assert len(result.outputs[0].token_ids) == 10
        else:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call.read()
            assert error.value.code() == grpc.StatusCode.ABORTED
    source.call.cancel()
    await clear(prefill, decode)


async def test_a_void_that_meets_the_end_loses_no_token(decode: Channel) -> None:
    """Whichever comes first: the stream ends with all tokens of one attempt, or is ABORTED."""
    for number in range(60):
        request = Request(prompt(20, 13), sampling(max_tokens=1 + number % 4), cache_salt=f"void {number}")
        call = DecodeCall(decode, request)
        await call.admit()
        attempts: dict[int, Output] = {}
        try:
            await call.begin(1, local_prefill=True)
            for _ in range(number % 20):
                await asyncio.sleep(0)
            await call.begin(2, local_prefill=True)
            while message := await call.read():
                for new in message.tokens.outputs:
                    output = attempts.setdefault(message.tokens.attempt, Output())
                    output.add(new.position, new.token_ids, new.logprobs, new.finish_reason)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # a write after the end fails on the client's side, and hides the status
            lost = await call.call.details() == "Internal error from Core"
            assert lost or await call.call.code() == grpc.StatusCode.ABORTED, await call.call.details()
        else:
            ended = [output for output in attempts.values() if output.finish_reason]
            assert [len(output.token_ids) for output in ended] == [request.params.max_tokens]
    await settled(decode)


async def test_blocks_of_an_ended_export_are_never_used(prefill: Channel, decode: Channel) -> None:
    """Its blocks can still be read, and may by then hold another prompt."""
    request = Request(prompt(50, 12), sampling())
    source = PrefillCall(prefill, request)
    await source.finish()
    source.call.cancel()
    await settled(prefill)
    call = DecodeCall(decode, request)
    await call.admit()
    for extent in source.extents:
        await call.import_blocks(1, extent)
    await call.begin(1, source.first_tokens.tokens)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call.read()
    assert error.value.code() == grpc.StatusCode.ABORTED
    await settled(decode)
    again = DecodeCall(decode, request)
    assert (await again.admit()).held_tokens == 0
    again.call.cancel()
    await settled(decode)


async def test_a_prefill_worker_that_cannot_be_reached_fails_the_stream(decode: Channel) -> None:
    call = DecodeCall(decode, Request(prompt(16, 11), sampling()))
    await call.admit()
    info = await worker_pb2_grpc.WorkerServiceStub(decode).GetInfo(worker_pb2.GetInfoRequest())
    extent = kv_pb2.KvExtent(
        kv_endpoint="127.0.0.1:1", epoch=5, layout_digest=info.layout.digest, block_ids=[1], num_tokens=16
    )
    await call.import_blocks(1, extent)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async with asyncio.timeout(10):
            await call.read()
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    await settled(decode)


# -- refusals ---------------------------------------------------------------------------------------------------------


SALTS = itertools.count()


def admit(**change: Any) -> decode_pb2.DecodeRequest:
    # under a salt of its own nothing is held
    fields = {**Request(prompt(20), sampling(), cache_salt=f"salt {next(SALTS)}").fields, **change}
    return decode_pb2.DecodeRequest(admit=decode_pb2.Admit(**fields))


def extent_of(**change: Any) -> decode_pb2.DecodeRequest:
    fields: dict[str, Any] = {"block_ids": [1, 2], "num_tokens": 20, "kv_endpoint": "127.0.0.1:1", "layout_digest": "x"}
    extent = kv_pb2.KvExtent(**{**fields, **change})
    return decode_pb2.DecodeRequest(import_blocks=decode_pb2.ImportBlocks(attempt=1, extent=extent))


def begin_of(attempt: int = 1, local_prefill: bool = False, **token: Any) -> decode_pb2.DecodeRequest:
    tokens = [prefill_pb2.FirstToken(**token)] if token else []
    begin = decode_pb2.Begin(attempt=attempt, first_tokens=tokens, local_prefill=local_prefill)
    return decode_pb2.DecodeRequest(begin=begin)


FINISH = decode_pb2.DecodeRequest(finish=decode_pb2.Finish(output_indices=[1]))

BAD_MESSAGES: list[tuple[str, list[decode_pb2.DecodeRequest]]] = [
    ("event", [decode_pb2.DecodeRequest()]),
    ("event", []),
    ("event", [admit()]),
    ("begin", [begin_of()]),
    ("finish", [FINISH]),
    ("admit", [admit(), admit()]),
    ("admit.token_ids", [admit(token_ids=[])]),
    ("admit.token_ids", [admit(token_ids=[384])]),
    ("admit.token_ids", [admit(token_ids=prompt(2048), num_prompt_tokens=2048)]),
    ("admit.num_prompt_tokens", [admit(num_prompt_tokens=21)]),
    ("admit.output_indices", [admit(output_indices=[3])]),
    ("admit.sampling.max_tokens", [admit(sampling=types_pb2.SamplingParams())]),
    ("admit.sampling.max_tokens", [admit(sampling=sampling(max_tokens=2029))]),
    ("admit.sampling.max_tokens", [admit(sampling=sampling(max_tokens=2**32 - 1))]),
    ("admit.sampling.top_p", [admit(sampling=sampling(top_p=7))]),
    ("finish.output_indices", [admit(), FINISH]),
    ("import_blocks.attempt", [admit(), decode_pb2.DecodeRequest(import_blocks=decode_pb2.ImportBlocks())]),
    ("import_blocks.extent.first_token", [admit(), extent_of(first_token=16)]),
    ("import_blocks.extent.first_token", [admit(), extent_of(first_token=2**32 - 1)]),
    ("import_blocks.extent.num_tokens", [admit(), extent_of(num_tokens=21)]),
    ("import_blocks.extent.num_tokens", [admit(), extent_of(num_tokens=0)]),
    ("import_blocks.extent.num_tokens", [admit(), extent_of(num_tokens=2**32 - 1)]),
    ("kv_endpoint", [admit(), extent_of(kv_endpoint="/etc/passwd")]),
    ("begin.attempt", [admit(), begin_of(attempt=0)]),
    ("begin", [admit(), begin_of(index=0, token_id=5)]),
    ("begin.local_prefill", [admit(), begin_of(local_prefill=True, index=0, token_id=5)]),
    ("begin", [admit(), begin_of(local_prefill=True), begin_of(local_prefill=True)]),
    ("import_blocks", [admit(), begin_of(local_prefill=True), extent_of()]),
]


async def send_all(decode: Channel, messages: list[decode_pb2.DecodeRequest]) -> None:
    """Sends messages, waiting for the reservation after the first where more follow, and reads to the end."""
    call = decode_pb2_grpc.DecodeServiceStub(decode).Decode()
    for index, message in enumerate(messages):
        await call.write(message)
        if index == 0 and message.HasField("admit") and len(messages) > 1:
            assert (await call.read()).HasField("reserved")
    if not messages or len(messages) == 1:
        await call.done_writing()
    while await call.read() is not grpc.aio.EOF:
        pass


@pytest.mark.parametrize(("field", "messages"), BAD_MESSAGES)
async def test_a_bad_message_is_named(decode: Channel, field: str, messages: list[decode_pb2.DecodeRequest]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await send_all(decode, messages)
    refused = from_grpc(error.value)
    assert refused.code == grpc.StatusCode.INVALID_ARGUMENT, refused
    assert refused.field == field
    await settled(decode)


@pytest.mark.parametrize(
    ("change", "code", "field"),
    [
        ({"layout_digest": "x"}, grpc.StatusCode.FAILED_PRECONDITION, "extent.layout_digest"),
        ({"block_ids": [1]}, grpc.StatusCode.INVALID_ARGUMENT, "extent.num_tokens"),
        ({"block_ids": [1, 2**32 - 1]}, grpc.StatusCode.INVALID_ARGUMENT, "extent.block_ids"),
        ({"epoch": 5}, grpc.StatusCode.ABORTED, "epoch"),
    ],
)
async def test_an_extent_that_its_pool_cannot_have_is_named(
    prefill: Channel, decode: Channel, change: dict[str, Any], code: grpc.StatusCode, field: str
) -> None:
    info = await worker_pb2_grpc.WorkerServiceStub(prefill).GetInfo(worker_pb2.GetInfoRequest())
    known = {"kv_endpoint": info.kv_endpoint, "epoch": info.epoch, "layout_digest": info.layout.digest}
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async with asyncio.timeout(10):
            await send_all(decode, [admit(), extent_of(**{**known, **change})])
    refused = from_grpc(error.value)
    assert refused.code == code, refused
    assert field in refused.message
    await settled(decode)


@pytest.mark.parametrize(
    ("tokens", "params", "field"),
    [
        (129, {"max_tokens": 1}, "admit.token_ids"),
        (100, {"max_tokens": 30}, "admit.sampling.max_tokens"),
        (100, {"max_tokens": 5, "n": 9}, "admit.output_indices"),
    ],
)
async def test_what_can_never_fit_is_refused_at_once(
    tiny_model: MakeModel, tokens: int, params: dict[str, Any], field: str
) -> None:
    async with running_worker("decode", tiny_model("llama"), num_blocks=9) as (_, channel):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await DecodeCall(channel, Request(prompt(tokens), sampling(**params))).admit()
        assert from_grpc(error.value).field == field
        fitting = await generate(None, channel, Request(prompt(100), sampling(max_tokens=29)))
        assert len(fitting.outputs[0].token_ids) == 29


async def test_random_messages_are_never_a_bug(decode: Channel) -> None:
    rng = random.Random(12)
    makers: list[Callable[[], decode_pb2.DecodeRequest]] = [
        admit,
        lambda: extent_of(
            first_token=rng.choice((0, 16, 2**32 - 1)),
            num_tokens=rng.choice((0, 16, 20, 2**31)),
            block_ids=rng.choice(([], [0], [1], [1, 1], [2**32 - 1])),
            epoch=rng.choice((0, 2**64 - 1)),
        ),
        lambda: begin_of(rng.choice((0, 1, 2**32 - 1)), rng.random() < 0.5),
        lambda: begin_of(rng.choice((1, 2)), index=rng.choice((0, 9)), token_id=rng.choice((0, 384, 2**32 - 1))),
        lambda: FINISH,
        lambda: decode_pb2.DecodeRequest(finish=decode_pb2.Finish(output_indices=[0])),
    ]
    fine = (
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.ABORTED,  # an attempt ended while the next one voided it
    )
    for _ in range(60):
        call = decode_pb2_grpc.DecodeServiceStub(decode).Decode()
        try:
            await call.write(admit())
            await call.read()
            for _ in range(rng.randrange(1, 5)):
                await call.write(rng.choice(makers)())
            await call.done_writing()
            while await call.read() is not grpc.aio.EOF:
                pass
            code = await call.code()
        except grpc.aio.AioRpcError as error:
            code = error.code()
        except asyncio.InvalidStateError:  # the stream ended while this wrote to it
            code = await call.code()
        if await call.details() != "Internal error from Core":  # how a client's write fails after the end
            assert code in fine, (code, await call.details())
    await settled(decode)


async def test_connect_says_what_a_pair_uses(prefill: Channel, decode: Channel) -> None:
    info = await worker_pb2_grpc.WorkerServiceStub(prefill).GetInfo(worker_pb2.GetInfoRequest())
    stub = decode_pb2_grpc.DecodeServiceStub(decode)
    pair = await stub.Connect(decode_pb2.ConnectRequest(kv_endpoint=info.kv_endpoint))
    assert (pair.transport, pair.epoch) == (types_pb2.TRANSPORT_SHARED_MEMORY, info.epoch)
    assert pair.prefill_worker_id == info.worker_id
    described = await worker_pb2_grpc.WorkerServiceStub(decode).GetInfo(worker_pb2.GetInfoRequest())
    assert described.role == worker_pb2.WORKER_ROLE_DECODE
    assert [peer.worker_id for peer in described.peers] == [info.worker_id]
    for endpoint in ("", "nowhere", "unix:/tmp/x", "host:0"):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Connect(decode_pb2.ConnectRequest(kv_endpoint=endpoint))
        assert from_grpc(error.value).field == "kv_endpoint"


async def test_another_layout_is_refused_by_field(prefill: Channel, tiny_model: MakeModel) -> None:
    async with running_worker("decode", tiny_model("llama", seed=1)) as (_, channel):  # type: ignore[call-arg]
        info = await worker_pb2_grpc.WorkerServiceStub(prefill).GetInfo(worker_pb2.GetInfoRequest())
        stub = decode_pb2_grpc.DecodeServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Connect(decode_pb2.ConnectRequest(kv_endpoint=info.kv_endpoint))
        assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "model_digest" in (error.value.details() or "")


async def test_draining_lets_what_runs_go_on(tiny_model: MakeModel) -> None:
    async with running_worker("decode", tiny_model("llama")) as (_, channel):
        call = DecodeCall(channel, Request(prompt(20), sampling(max_tokens=30)))
        result = Result(reserved=await call.admit())
        await worker_pb2_grpc.WorkerServiceStub(channel).Drain(worker_pb2.DrainRequest())
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await DecodeCall(channel, Request(prompt(20), sampling())).admit()
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        await call.begin(1, local_prefill=True)
        await receive(call, result)
        assert isinstance(result.outputs[0], Output)
        assert len(result.outputs[0].token_ids) == 30
        assert (await load(channel)).draining
