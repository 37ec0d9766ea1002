"""Workers that fail at each step of a request: what the client sees is what an undisturbed request generates."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from tandem.v1 import decode_pb2, prefill_pb2, types_pb2

from shared.rpc import RpcError, exhausted, invalid, stale, unavailable
from tests.scripted_scene import Collected, Scene, request, scene_of
from tests.scripted_workers import (
    TOKENIZER,
    Conversation,
    ScriptedDecode,
    ScriptedPrefill,
    expected_tokens,
)

PROMPT = TOKENIZER.encode("hello world")
Replies = AsyncIterator[decode_pb2.DecodeResponse]


def once(worker: Any, script: Any) -> None:
    """Follows a script on the next stream, and the usual one after that."""
    usual = worker.script

    async def first(worker: Any, item: Any) -> AsyncIterator[Any]:
        worker.script = usual
        async for reply in script(worker, item):
            yield reply

    worker.script = first


async def fail(error: RpcError) -> AsyncIterator[Any]:
    raise error
    yield


def by_id(scene: Scene, worker_id: str) -> Any:
    return next(worker for worker in (*scene.prefills, *scene.decodes) if worker.worker_id == worker_id)


def busy_decode(scene: Scene) -> ScriptedDecode:
    return next(worker for worker in scene.decodes if worker.open_streams)


async def dies_later(worker: ScriptedDecode, conversation: Conversation) -> Replies:
    """Half the tokens, then the worker is told to go away."""
    async for reply in worker.generate_then_hang(conversation, 2):
        yield reply


# -- prefill fails ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["at once", "after an extent", "after the first tokens"])
async def test_another_prefill_takes_over_on_the_same_reservation(step: str) -> None:
    async with scene_of(prefill=2) as scene:

        async def failing(worker: ScriptedPrefill, item: prefill_pb2.PrefillRequest) -> AsyncIterator[Any]:
            if step != "at once":
                yield worker.extent(item)
            if step == "after the first tokens":
                yield worker.first_tokens(item)
            raise unavailable("the worker is going away")

        async def import_late(worker: ScriptedDecode, conversation: Conversation) -> Replies:
            yield conversation.reserved()
            await conversation.read_until("begin")
            if step == "after the first tokens":
                await conversation.read_until("begin")
            yield conversation.imported()
            histories = conversation.histories()
            while (reply := conversation.tokens(histories, 2)).tokens.outputs:
                yield reply

        scene.prefill.script = failing  # of two idle workers the first is asked first
        scene.decode.script = import_late
        collected = await scene.collect(request(n=2, logprobs=0))
        await scene.idle()
        assert collected.token_ids == {index: expected_tokens(PROMPT, 6, index) for index in range(2)}
        [conversation] = scene.decode.conversations
        assert conversation.begin is not None
        assert conversation.begin.attempt == 2
        assert conversation.imports[-1].attempt == 2
        assert [worker.requests[0].attempt for worker in scene.prefills] == [1, 2]
        receipt = collected.last.receipt
        assert receipt.attempts == 2
        assert receipt.prefill_workers == (["p0#1", "p1#1"] if step == "after the first tokens" else ["p1#1"])


async def test_the_last_prefill_gone_decode_computes_the_prompt_itself(scene: Scene) -> None:
    scene.prefill.script = lambda worker, item: fail(unavailable("going away"))
    collected = await scene.collect(request())
    assert collected.token_ids[0] == expected_tokens(PROMPT, 6)
    begin = scene.decode.conversations[0].begin
    assert begin is not None
    assert (begin.local_prefill, begin.attempt) == (True, 2)
    assert collected.last.receipt.transport == types_pb2.TRANSPORT_UNSPECIFIED


async def test_a_killed_prefill_process(scene: Scene) -> None:
    started = asyncio.Event()

    async def hang(worker: ScriptedPrefill, item: prefill_pb2.PrefillRequest) -> AsyncIterator[Any]:
        yield worker.extent(item)
        started.set()
        await asyncio.Event().wait()

    scene.prefill.script = hang
    task = asyncio.create_task(scene.collect(request()))
    await started.wait()
    await scene.prefill.kill()
    assert (await task).token_ids[0] == expected_tokens(PROMPT, 6)


async def test_every_prefill_full_is_the_clients_to_retry() -> None:
    async with scene_of(prefill=2) as scene:
        for worker in scene.prefills:
            worker.script = lambda worker, item: fail(exhausted("no room", 0.7))
        with pytest.raises(RpcError, match="no room") as error:
            await scene.collect(request())
        await scene.idle()
        assert error.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.value.retry_after_s == pytest.approx(0.7)
        assert [len(worker.requests) for worker in scene.prefills] == [1, 1]


async def test_what_prefill_finds_wrong_is_the_clients_answer(scene: Scene) -> None:
    scene.prefill.script = lambda worker, item: fail(invalid("token_ids", "too many for this pool"))
    with pytest.raises(RpcError, match="too many for this pool") as error:
        await scene.collect(request())
    assert (error.value.code, error.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, "token_ids")


async def test_prefill_that_sends_tokens_of_other_outputs_is_given_up(scene: Scene) -> None:
    async def other(worker: ScriptedPrefill, item: prefill_pb2.PrefillRequest) -> AsyncIterator[Any]:
        reply = worker.first_tokens(item)
        reply.first_tokens.tokens[0].index = 7
        yield reply

    scene.prefill.script = other
    assert (await scene.collect(request())).token_ids[0] == expected_tokens(PROMPT, 6)


# -- decode refuses ---------------------------------------------------------------------------------------------------


async def test_what_decode_refuses_never_reaches_prefill(scene: Scene) -> None:
    scene.decode.script = lambda worker, conversation: fail(invalid("sampling.n", "too many"))
    with pytest.raises(RpcError, match="too many"):
        await scene.collect(request())
    assert not scene.prefill.requests


@pytest.mark.parametrize("error", [exhausted("full", 0.3), unavailable("draining")])
async def test_another_decode_takes_what_one_refuses(error: RpcError) -> None:
    async with scene_of(decode=2) as scene:
        for worker in scene.decodes:
            once(worker, lambda worker, conversation: fail(error))
        with pytest.raises(RpcError) as refused:
            await scene.collect(request())
        assert refused.value.code == error.code
        assert refused.value.retry_after_s == error.retry_after_s
        assert [len(worker.conversations) for worker in scene.decodes] == [1, 1]
        once(scene.decodes[0], lambda worker, conversation: fail(error))
        for _ in range(2):  # whichever is asked first, one of these finds the refusing one
            assert (await scene.collect(request())).token_ids[0] == expected_tokens(PROMPT, 6)


async def test_a_refused_connection_is_an_error_at_once(scene: Scene) -> None:
    await scene.decode.kill()
    async with asyncio.timeout(1):
        with pytest.raises(RpcError) as error:
            await scene.collect(request())
    assert error.value.code == grpc.StatusCode.UNAVAILABLE


# -- decode fails -----------------------------------------------------------------------------------------------------


async def test_decode_dies_in_mid_stream_and_another_goes_on() -> None:
    async with scene_of(decode=2) as scene:
        for worker in scene.decodes:
            once(worker, dies_later)
        collected = Collected()
        tokens = expected_tokens(PROMPT, 12)
        stop = TOKENIZER.decode(tokens[7:10])
        async with aclosing(scene.gateway.generate(request(max_tokens=12, stop=[stop], logprobs=0))) as chunks:
            while len(collected.token_ids.get(0, [])) < 3:
                collected.add(await anext(chunks))
            lost = busy_decode(scene)
            other = next(worker for worker in scene.decodes if worker is not lost)
            other.script = ScriptedDecode.generate
            await lost.kill()
            async for chunk in chunks:
                collected.add(chunk)
        await scene.idle()
        assert collected.token_ids[0] == tokens[:10]
        assert collected.texts[0] == TOKENIZER.decode(tokens[:7])
        assert collected.ends[0].stop_match == stop
        assert [position.chosen.token_id for position in collected.logprobs[0]] == tokens[:10]
        [conversation] = other.conversations
        assert list(conversation.admit.token_ids) == [*PROMPT, *tokens[:3]]
        assert conversation.admit.num_prompt_tokens == len(PROMPT)
        assert [item.attempt for item in scene.prefill.requests] == [1, 2]
        assert collected.last.usage == types_pb2.Usage(prompt_tokens=len(PROMPT), cached_tokens=2, completion_tokens=10)
        assert collected.last.receipt.attempts == 2
        assert collected.last.receipt.decode_workers == [lost.worker_id, other.worker_id]


async def test_several_outputs_go_on_by_themselves_after_a_loss() -> None:
    async with scene_of(decode=2) as scene:
        for worker in scene.decodes:
            once(worker, dies_later)
        collected = Collected()
        async with aclosing(scene.gateway.generate(request(n=3, max_tokens=8))) as chunks:
            while len(collected.token_ids.get(2, [])) < 3:
                collected.add(await anext(chunks))
            lost = busy_decode(scene)
            other = next(worker for worker in scene.decodes if worker is not lost)
            other.script = ScriptedDecode.generate
            await lost.kill()
            async for chunk in chunks:
                collected.add(chunk)
        await scene.idle()
        assert collected.token_ids == {index: expected_tokens(PROMPT, 8, index) for index in range(3)}
        histories = {tuple(output.token_ids) for output in (c.admit for c in other.conversations)}
        assert histories == {(*PROMPT, *expected_tokens(PROMPT, 3, index)) for index in range(3)}
        assert sorted(index for c in other.conversations for index in c.admit.output_indices) == [0, 1, 2]


async def test_outputs_with_the_same_history_stay_together(scene: Scene) -> None:
    async def lost_early(worker: ScriptedDecode, conversation: Conversation) -> Replies:
        yield conversation.reserved()
        raise unavailable("going away")

    once(scene.decode, lost_early)
    collected = await scene.collect(request(n=3))
    assert collected.token_ids == {index: expected_tokens(PROMPT, 6, index) for index in range(3)}
    assert [list(c.admit.output_indices) for c in scene.decode.conversations] == [[0, 1, 2], [0, 1, 2]]


async def test_the_only_decode_comes_back(scene: Scene) -> None:
    once(scene.decode, dies_later)
    collected = Collected()
    async with aclosing(scene.gateway.generate(request(max_tokens=8))) as chunks:
        while len(collected.token_ids.get(0, [])) < 3:
            collected.add(await anext(chunks))
        await scene.decode.kill()
        await scene.gone(scene.decode)
        await scene.decode.start()
        async for chunk in chunks:
            collected.add(chunk)
    assert collected.token_ids[0] == expected_tokens(PROMPT, 8)
    assert collected.last.receipt.decode_workers == ["d0#1", "d0#2"]


async def test_no_decode_comes_back() -> None:
    async with scene_of(recovery_wait_s=0.3) as scene:
        once(scene.decode, dies_later)
        collected = Collected()
        async with aclosing(scene.gateway.generate(request(max_tokens=8))) as chunks:
            while len(collected.token_ids.get(0, [])) < 3:
                collected.add(await anext(chunks))
            await scene.decode.kill()
            with pytest.raises(RpcError, match=r"no decode worker took the request over within 0.3 s") as error:
                await anext(chunks)
        assert error.value.code == grpc.StatusCode.UNAVAILABLE
        assert error.value.retry_after_s is not None
        assert collected.token_ids[0] == expected_tokens(PROMPT, 3)


async def test_as_many_handoffs_as_the_configuration_allows() -> None:
    async with scene_of(decode=2, max_attempts=3) as scene:

        async def lost(worker: ScriptedDecode, conversation: Conversation) -> Replies:
            yield conversation.reserved()
            await conversation.read_until("begin")
            raise unavailable("going away")

        for worker in scene.decodes:
            worker.script = lost
        with pytest.raises(RpcError, match="handed over 3 times without success") as error:
            await scene.collect(request())
        assert error.value.code == grpc.StatusCode.UNAVAILABLE
        await scene.idle()
        assert len(scene.prefill.requests) == 3


async def test_a_stale_import_is_done_again_on_the_same_worker(scene: Scene) -> None:
    async def stale_once(worker: ScriptedDecode, conversation: Conversation) -> Replies:
        yield conversation.reserved()
        await conversation.read_until("begin")
        raise stale("the pool's epoch is another")

    once(scene.decode, stale_once)
    collected = await scene.collect(request())
    assert collected.token_ids[0] == expected_tokens(PROMPT, 6)
    assert [item.attempt for item in scene.prefill.requests] == [1, 2]


async def test_a_stream_that_ends_early_without_an_error_is_no_end(scene: Scene) -> None:
    async def short(worker: ScriptedDecode, conversation: Conversation) -> Replies:
        yield conversation.reserved()
        await conversation.read_until("begin")
        yield conversation.imported()
        yield conversation.tokens(conversation.histories(), 2)

    once(scene.decode, short)
    assert (await scene.collect(request())).token_ids[0] == expected_tokens(PROMPT, 6)


async def test_a_bug_of_the_worker_is_not_tried_again(scene: Scene) -> None:
    async def bug(worker: ScriptedDecode, conversation: Conversation) -> Replies:
        yield conversation.reserved()
        raise ZeroDivisionError

    scene.decode.script = bug
    with pytest.raises(RpcError, match="incident") as error:
        await scene.collect(request())
    assert error.value.code == grpc.StatusCode.INTERNAL
    assert len(scene.decode.conversations) == 1


# -- what comes late, twice or out of order ---------------------------------------------------------------------------


async def test_late_messages_of_an_older_attempt_are_dropped() -> None:
    async with scene_of(prefill=2) as scene:
        begun = asyncio.Event()

        async def failing(worker: ScriptedPrefill, item: prefill_pb2.PrefillRequest) -> AsyncIterator[Any]:
            yield worker.extent(item)
            yield worker.first_tokens(item)
            await begun.wait()
            raise unavailable("going away")

        async def late(worker: ScriptedDecode, conversation: Conversation) -> Replies:
            yield conversation.reserved()
            await conversation.read_until("begin")
            old = conversation.histories()
            wrong = conversation.tokens(old, 3)
            for output in wrong.tokens.outputs:
                output.token_ids[:] = [5] * len(output.token_ids)
            begun.set()
            await conversation.read_until("begin")
            yield conversation.imported(attempt=1)
            yield wrong
            yield conversation.imported()
            yield conversation.tokens(conversation.histories(), 99)

        scene.prefill.script = failing
        scene.decode.script = late
        collected = await scene.collect(request())
        assert collected.token_ids[0] == expected_tokens(PROMPT, 6)
        assert collected.last.receipt.handoff_bytes == 1000


async def test_tokens_that_come_twice_are_delivered_once(scene: Scene) -> None:
    async def stutter(worker: ScriptedDecode, conversation: Conversation) -> Replies:
        yield conversation.reserved()
        await conversation.read_until("begin")
        yield conversation.imported()
        histories = conversation.histories()
        while (reply := conversation.tokens(histories, 2)).tokens.outputs:
            yield reply
            yield reply

    scene.decode.script = stutter
    collected = await scene.collect(request(max_tokens=8, logprobs=0))
    assert collected.token_ids[0] == expected_tokens(PROMPT, 8)
    assert len(collected.logprobs[0]) == 8


@pytest.mark.parametrize("break_it", ["gap", "output", "logprobs", "reserved"])
async def test_a_worker_that_breaks_the_contract_is_left(scene: Scene, break_it: str) -> None:
    async def broken(worker: ScriptedDecode, conversation: Conversation) -> Replies:
        yield conversation.reserved()
        await conversation.read_until("begin")
        yield conversation.imported()
        reply = conversation.tokens(conversation.histories(), 2)
        output = reply.tokens.outputs[0]
        if break_it == "gap":
            output.position += 1
        elif break_it == "output":
            output.index = 9
        elif break_it == "logprobs":
            output.logprobs.add()
        else:
            reply = conversation.reserved()
        yield reply
        await asyncio.Event().wait()

    once(scene.decode, broken)
    collected = await scene.collect(request())
    assert collected.token_ids[0] == expected_tokens(PROMPT, 6)
    assert len(scene.decode.conversations) == 2


# -- the client goes --------------------------------------------------------------------------------------------------

STEPS = ("admit", "reserved", "extent", "first tokens", "imported", "tokens")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("how", ["closed", "cancelled"])
async def test_a_client_that_goes_at_any_step_leaves_nothing(scene: Scene, step: str, how: str) -> None:
    reached = asyncio.Event()
    number = STEPS.index(step)

    async def stay(at: str) -> None:
        if at == step:
            reached.set()
            await asyncio.Event().wait()

    async def decode(worker: ScriptedDecode, conversation: Conversation) -> Replies:
        await stay("admit")
        yield conversation.reserved()
        await conversation.read_until("begin")
        await stay("first tokens")
        yield conversation.imported()
        await stay("imported")
        yield conversation.tokens(conversation.histories(), 1)
        await stay("tokens")

    async def prefill(worker: ScriptedPrefill, item: prefill_pb2.PrefillRequest) -> AsyncIterator[Any]:
        await stay("reserved")
        yield worker.extent(item)
        await stay("extent")
        yield worker.first_tokens(item)
        await asyncio.Event().wait()

    scene.decode.script, scene.prefill.script = decode, prefill
    chunks = scene.gateway.generate(request())
    task = asyncio.create_task(anext(chunks))
    await reached.wait()
    if how == "cancelled" and number < STEPS.index("first tokens"):
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
    else:
        if not task.done() and number < STEPS.index("first tokens"):
            task.cancel()
        await asyncio.wait({task})
        await chunks.aclose()
    await scene.idle()
    assert scene.gateway._admission.running == 0
    scene.decode.script, scene.prefill.script = ScriptedDecode.generate, ScriptedPrefill.compute
    assert (await scene.collect(request())).token_ids[0] == expected_tokens(PROMPT, 6)


async def test_a_burst_of_cancels_leaves_nothing_and_the_next_request_is_answered(scene: Scene) -> None:
    scene.decode.script = lambda worker, conversation: worker.generate_then_hang(conversation, 1)
    for _ in range(3):
        calls = [scene.stub.Generate(request(max_tokens=50)) for _ in range(60)]
        await scene.decode.until(lambda: scene.decode.open_streams >= 30)
        for call in calls:
            call.cancel()
        await asyncio.gather(*(call.code() for call in calls))
        await scene.idle()
    scene.decode.script = ScriptedDecode.generate
    assert (await scene.collect(request())).token_ids[0] == expected_tokens(PROMPT, 6)
