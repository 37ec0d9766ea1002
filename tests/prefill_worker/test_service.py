"""PrefillService over real gRPC, and what its streams hold."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from tandem.v1 import kv_pb2, kv_pb2_grpc, prefill_pb2, prefill_pb2_grpc, types_pb2, worker_pb2, worker_pb2_grpc

from shared.rpc import from_grpc
from tests.workers import PrefillCall, Request, load, running_worker, sampling, settled, until

MakeModel = Callable[[str], Path]


@pytest.fixture(scope="module")
async def prefill(tiny_model: MakeModel) -> AsyncIterator[grpc.aio.Channel]:
    settings = {"chunk_tokens": 32, "batch_tokens": 32}
    async with running_worker("prefill", tiny_model("llama"), **settings) as (_, channel):
        yield channel


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{length} {seed}")
    return [rng.randrange(3, 380) for _ in range(length)]


async def compute(channel: grpc.aio.Channel, request: Request, skip_tokens: int = 0) -> PrefillCall:
    """A finished prefill, its stream ended."""
    call = PrefillCall(channel, request, skip_tokens)
    await call.finish()
    call.call.cancel()
    await settled(channel)
    return call


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33, 100])
async def test_extents_cover_the_prompt_as_chunks_are_computed(prefill: grpc.aio.Channel, length: int) -> None:
    call = await compute(prefill, Request(prompt(length), sampling()))
    position = 0
    for extent in call.extents:
        assert extent.first_token == position
        assert len(extent.block_ids) == -(-extent.num_tokens // 16)
        position += extent.num_tokens
    assert position == length
    assert all(extent.num_tokens % 16 == 0 for extent in call.extents[:-1])
    if length == 100:
        assert len(call.extents) >= 3
    assert len(call.first_tokens.tokens) == 1


async def test_a_cached_prefix_is_announced_at_once_and_counted(prefill: grpc.aio.Channel) -> None:
    request = Request(prompt(70, 1), sampling(logprobs=3))
    cold = await compute(prefill, request)
    warm = await compute(prefill, request)
    assert (cold.first_tokens.cached_tokens, warm.first_tokens.cached_tokens) == (0, 64)
    assert [extent.num_tokens for extent in warm.extents] == [64, 6]
    assert warm.first_tokens.tokens == cold.first_tokens.tokens


@pytest.mark.parametrize("length", [16, 32, 48])
async def test_a_prompt_found_in_full_has_the_same_first_token(prefill: grpc.aio.Channel, length: int) -> None:
    request = Request(prompt(length, 2), sampling(logprobs=3))
    cold = await compute(prefill, request)
    warm = await compute(prefill, request)
    assert warm.first_tokens.cached_tokens == length - 16
    assert warm.first_tokens.tokens == cold.first_tokens.tokens
    assert sum(extent.num_tokens for extent in warm.extents) == length


async def test_a_salt_sees_no_other_salts_blocks(prefill: grpc.aio.Channel) -> None:
    request = Request(prompt(40, 3), sampling())
    await compute(prefill, request)
    request.cache_salt = "tenant"
    assert (await compute(prefill, request)).first_tokens.cached_tokens == 0
    assert (await compute(prefill, request)).first_tokens.cached_tokens == 32


@pytest.mark.parametrize(("skip_tokens", "first"), [(16, 16), (48, 48), (64, 64), (15, 0), (40, 32), (69, 64)])
async def test_what_decode_holds_is_not_announced(prefill: grpc.aio.Channel, skip_tokens: int, first: int) -> None:
    """Decode's blocks may be smaller: then a block of which it lacks a part is announced."""
    call = await compute(prefill, Request(prompt(70, 4), sampling()), skip_tokens)
    assert call.extents[0].first_token == first
    assert sum(extent.num_tokens for extent in call.extents) == 70 - first


async def test_each_output_has_its_own_first_token_with_logprobs(prefill: grpc.aio.Channel) -> None:
    params = sampling(temperature=1.2, n=6, logprobs=2, prompt_logprobs=1)
    call = await compute(prefill, Request(prompt(40, 5), params))
    tokens = call.first_tokens.tokens
    assert [token.index for token in tokens] == list(range(6))
    assert len({token.token_id for token in tokens}) > 1
    assert all(token.logprobs.chosen.token_id == token.token_id and len(token.logprobs.top) == 2 for token in tokens)
    reports = call.first_tokens.prompt_logprobs
    assert [report.chosen.token_id for report in reports] == prompt(40, 5)[1:]
    # computed again, whatever the cache holds
    again = await compute(prefill, Request(prompt(40, 5), params))
    assert again.first_tokens.prompt_logprobs == reports
    assert again.first_tokens.cached_tokens == 0


async def test_after_a_recovery_the_position_goes_on(prefill: grpc.aio.Channel) -> None:
    """The first token of prompt + 5 generated tokens is drawn as the sixth, and counts as such."""
    history = prompt(30, 6)
    params = sampling(temperature=1.0, max_tokens=6, logprobs=0)
    last = await compute(prefill, Request(history, params, num_prompt_tokens=25))
    assert last.first_tokens.tokens[0].finish_reason == types_pb2.FINISH_REASON_LENGTH
    params.max_tokens = 7
    seventh = await compute(prefill, Request(history, params, num_prompt_tokens=25))
    assert seventh.first_tokens.tokens[0].finish_reason == types_pb2.FINISH_REASON_UNSPECIFIED
    assert seventh.first_tokens.tokens[0].token_id == last.first_tokens.tokens[0].token_id


async def test_the_end_token_finishes_an_output(prefill: grpc.aio.Channel) -> None:
    params = sampling(ignore_eos=False, logit_bias={2: 1e6})
    call = await compute(prefill, Request(prompt(20, 7), params))
    assert (call.first_tokens.tokens[0].token_id, call.first_tokens.tokens[0].finish_reason) == (2, 1)


async def test_blocks_are_held_until_the_stream_ends(prefill: grpc.aio.Channel) -> None:
    request = Request(prompt(40, 8), sampling())
    calls = [PrefillCall(prefill, request) for _ in range(2)]
    for call in calls:
        await call.finish()
    held = await load(prefill)
    assert (held.running, held.exports) == (2, 2)
    # the second found the first one's full blocks, or has its own of equal content
    assert 4 <= held.allocated_blocks <= 6
    calls[0].call.cancel()
    assert (await until(prefill, lambda seen: seen.running == 1)).allocated_blocks == 3
    calls[1].call.cancel()
    await settled(prefill)


async def test_a_cancel_at_any_step_frees_the_blocks(prefill: grpc.aio.Channel) -> None:
    for num_messages in range(6):
        call = PrefillCall(prefill, Request(prompt(120, 9 + num_messages), sampling()))
        for _ in range(num_messages):
            await call.call.read()
        call.call.cancel()
        await settled(prefill)


async def test_a_deadline_frees_the_blocks(prefill: grpc.aio.Channel) -> None:
    stub = prefill_pb2_grpc.PrefillServiceStub(prefill)
    call = stub.Prefill(prefill_pb2.PrefillRequest(**Request(prompt(40), sampling()).fields), timeout=0.3)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in call:
            pass
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await settled(prefill)


async def test_bursts_of_cancels_leave_nothing_behind(prefill: grpc.aio.Channel) -> None:
    for burst in range(3):
        calls = [PrefillCall(prefill, Request(prompt(60, 100 * burst + i), sampling())) for i in range(60)]
        await asyncio.gather(*(call.call.read() for call in calls[:5]))
        for call in calls:
            call.call.cancel()
        await settled(prefill)
    assert (await compute(prefill, Request(prompt(20), sampling()))).first_tokens.tokens


async def test_a_short_prompt_is_done_before_the_long_one_ahead_of_it(prefill: grpc.aio.Channel) -> None:
    long = PrefillCall(prefill, Request(prompt(900, 10), sampling()))
    await long.next_extent()
    short = PrefillCall(prefill, Request(prompt(20, 11), sampling()))
    finished: list[str] = []

    async def finish(name: str, call: PrefillCall) -> None:
        await call.finish()
        finished.append(name)

    await asyncio.gather(finish("long", long), finish("short", short))
    assert finished == ["short", "long"]
    long.call.cancel()
    short.call.cancel()
    await settled(prefill)


async def test_an_ended_export_is_not_served(prefill: grpc.aio.Channel) -> None:
    call = PrefillCall(prefill, Request(prompt(40, 12), sampling()))
    await call.finish()
    extent = call.extents[0]
    request = kv_pb2.FetchRequest(export_id=extent.export_id, epoch=extent.epoch, block_ids=extent.block_ids)
    stub = kv_pb2_grpc.KvServiceStub(prefill)
    assert [len(reply.data) > 0 async for reply in stub.Fetch(request)]
    call.call.cancel()
    await settled(prefill)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in stub.Fetch(request):
            pass
    assert error.value.code() == grpc.StatusCode.ABORTED


BAD_REQUESTS = {
    "token_ids": [{"token_ids": []}, {"token_ids": [5, 384]}, {"token_ids": [2**32 - 1]}, {"token_ids": prompt(2048)}],
    "num_prompt_tokens": [{"num_prompt_tokens": 0}, {"num_prompt_tokens": 21}],
    "output_indices": [{"output_indices": []}, {"output_indices": [0, 0]}, {"output_indices": [1]}],
    "skip_tokens": [{"skip_tokens": 32}, {"skip_tokens": 2**32 - 16}],
    "cache_salt": [{"cache_salt": "x" * 2000}],
    "request_id": [{"request_id": "x" * 2000}],
    "sampling.max_tokens": [
        {"sampling": types_pb2.SamplingParams()},
        {"sampling": sampling(max_tokens=0)},
        {"sampling": sampling(max_tokens=2029)},
    ],
    "sampling.temperature": [{"sampling": sampling(temperature=t)} for t in (-1, float("nan"), float("inf"))],
    "sampling.top_p": [{"sampling": sampling(top_p=p)} for p in (0, 1.5, float("nan"))],
    "sampling.n": [{"sampling": sampling(n=0)}, {"sampling": sampling(n=129)}],
    "sampling.logprobs": [{"sampling": sampling(logprobs=1000)}],
    "sampling.logit_bias[999]": [{"sampling": sampling(logit_bias={999: 1.0})}],
    "sampling.stop_token_ids[0]": [{"sampling": sampling(stop_token_ids=[384])}],
    "sampling.grammar": [{"sampling": sampling(grammar=types_pb2.Grammar(json_object=True))}],
}


@pytest.mark.parametrize(("field", "change"), [(f, c) for f, changes in BAD_REQUESTS.items() for c in changes])
async def test_a_bad_field_is_named(prefill: grpc.aio.Channel, field: str, change: dict[str, object]) -> None:
    fields = {**Request(prompt(20), sampling()).fields, **change}
    if "token_ids" in change and "num_prompt_tokens" not in change:
        fields["num_prompt_tokens"] = max(len(fields["token_ids"]), 1)
    call = prefill_pb2_grpc.PrefillServiceStub(prefill).Prefill(prefill_pb2.PrefillRequest(**fields))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call.read()
    refused = from_grpc(error.value)
    assert refused.code == grpc.StatusCode.INVALID_ARGUMENT, refused
    assert refused.field == field


async def test_an_unknown_model_is_not_found(prefill: grpc.aio.Channel) -> None:
    fields = Request(prompt(20), sampling()).fields
    call = prefill_pb2_grpc.PrefillServiceStub(prefill).Prefill(prefill_pb2.PrefillRequest(model="other", **fields))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call.read()
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


async def test_random_requests_are_served_or_refused_by_field(prefill: grpc.aio.Channel) -> None:
    rng = random.Random(5)
    edges = (0, 1, 15, 16, 17, 2**31, 2**32 - 1)
    numbers = (0.0, -1.0, 1.0, 1e300, float("nan"), float("inf"), 0.5)
    codes: set[grpc.StatusCode] = set()
    for _ in range(150):
        params = types_pb2.SamplingParams()
        for field in types_pb2.SamplingParams.DESCRIPTOR.fields:
            if field.name in ("stop", "stop_token_ids", "logit_bias", "grammar") or rng.random() < 0.01:
                continue
            plain = getattr(sampling(), field.name)
            odd = rng.random() < 0.05
            pool = numbers if isinstance(plain, float) else (True, False) if isinstance(plain, bool) else edges
            setattr(params, field.name, rng.choice(pool) if odd else plain)
        request = prefill_pb2.PrefillRequest(
            token_ids=[384 if rng.random() < 0.01 else 7] * rng.choice((1, 15, 16, 17, 0)),
            num_prompt_tokens=rng.choice((1, 1, 1, 1, 1, 1, *edges)),
            sampling=params,
            output_indices=rng.choice(((0,), (0,), (0,), (), (0, 0), (2**32 - 1,))),
            skip_tokens=rng.choice((0, 0, 0, 0, 0, 0, *edges)),
            priority=rng.choice((0, -(2**31), 2**31 - 1)),
        )
        call = prefill_pb2_grpc.PrefillServiceStub(prefill).Prefill(request)
        try:
            await call.read()
            codes.add(grpc.StatusCode.OK)
        except grpc.aio.AioRpcError as error:
            codes.add(error.code())
        call.cancel()
    assert codes == {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}
    await settled(prefill)


async def test_a_full_line_is_refused_and_a_pinned_pool_recovers(tiny_model: MakeModel) -> None:
    settings = {"num_blocks": 9, "max_waiting": 2, "prefix_cache": False}
    async with running_worker("prefill", tiny_model("llama"), **settings) as (_, channel):
        too_long = PrefillCall(channel, Request(prompt(129), sampling()))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await too_long.call.read()
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        held = PrefillCall(channel, Request(prompt(128, 1), sampling()))
        await held.finish()
        waiting = [PrefillCall(channel, Request(prompt(20, 2 + i), sampling())) for i in range(2)]
        await until(channel, lambda seen: seen.waiting == 2)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await PrefillCall(channel, Request(prompt(20, 9), sampling())).call.read()
        refused = from_grpc(error.value)
        assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.retry_after_s
        held.call.cancel()
        for call in waiting:
            await call.finish()
            call.call.cancel()
        await settled(channel)


async def test_draining_lets_what_runs_go_on(tiny_model: MakeModel) -> None:
    async with running_worker("prefill", tiny_model("llama")) as (_, channel):
        held = PrefillCall(channel, Request(prompt(20), sampling()))
        await held.next_extent()
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        assert (await stub.Drain(worker_pb2.DrainRequest())).running == 1
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await PrefillCall(channel, Request(prompt(20), sampling())).call.read()
        refused = from_grpc(error.value)
        assert refused.code == grpc.StatusCode.UNAVAILABLE
        assert refused.retry_after_s
        assert (await held.finish()).tokens
        assert (await load(channel)).draining
        held.call.cancel()
        await settled(channel)


async def test_a_worker_describes_itself(prefill: grpc.aio.Channel) -> None:
    stub = worker_pb2_grpc.WorkerServiceStub(prefill)
    info = await stub.GetInfo(worker_pb2.GetInfoRequest())
    assert info.role == worker_pb2.WORKER_ROLE_PREFILL
    assert (info.family, info.max_context, info.vocab_size, info.num_blocks) == ("llama", 2048, 384, 63)
    assert info.kv_endpoint
    assert info.epoch
    assert (info.layout.block_tokens, info.layout.dtype) == (16, "float32")
    assert {"tandem", "python", "torch"} <= set(info.versions)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.WatchLoad(worker_pb2.WatchLoadRequest(interval_s=-1)).read()
    assert from_grpc(error.value).field == "interval_s"
