"""Streams that break and go on: the same request sent again, Resume, and how long a request is kept for it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from tandem.v1 import inference_pb2, types_pb2

from gateway.output import Output
from gateway.record import Record
from gateway.record_store import RecordStore
from shared.rpc import RpcError, unavailable
from tests.scripted_scene import Collected, Scene, request, scene_of
from tests.scripted_workers import TOKENIZER, Conversation, expected_tokens

PROMPT = TOKENIZER.encode("hello world")
NOT_YET, LENGTH = types_pb2.FINISH_REASON_UNSPECIFIED, types_pb2.FINISH_REASON_LENGTH


def paced(scene: Scene) -> asyncio.Semaphore:
    """Decode gives one token for each release of the semaphore."""
    pace = asyncio.Semaphore(0)

    async def script(worker: Any, conversation: Conversation):
        yield conversation.reserved()
        await conversation.read_until("begin")
        yield conversation.imported()
        histories = conversation.histories()
        while True:
            await pace.acquire()
            if not (reply := conversation.tokens(histories, 1)).tokens.outputs:
                return
            yield reply

    scene.decode.script = script
    return pace


async def read_until(chunks: Any, collected: Collected, count: int) -> None:
    while len(collected.token_ids.get(0, [])) < count:
        collected.add(await anext(chunks))


async def resumed(scene: Scene, **fields: Any) -> list[inference_pb2.GenerateResponse]:
    stream = scene.gateway.resume(inference_pb2.ResumeRequest(**fields))
    async with aclosing(stream):
        return [reply.chunk async for reply in stream]


async def test_resume_goes_on_where_the_client_stopped(scene: Scene) -> None:
    pace = paced(scene)
    wanted = request(request_id="r1", max_tokens=8, logprobs=0)
    chunks = scene.gateway.generate(wanted, resumable=True)
    collected = Collected()
    for _ in range(3):
        pace.release()
    await read_until(chunks, collected, 4)
    await chunks.aclose()
    assert scene.gateway.num_requests == 1
    for _ in range(20):
        pace.release()
    for chunk in await resumed(scene, request_id="r1", next_position=4):
        collected.add(chunk)
    assert collected.token_ids[0] == expected_tokens(PROMPT, 8)
    assert collected.texts[0] == TOKENIZER.decode(collected.token_ids[0])
    assert [position.chosen.token_id for position in collected.logprobs[0]] == collected.token_ids[0]
    assert collected.last.usage.completion_tokens == 8
    assert len(scene.decode.conversations) == 1


@pytest.mark.parametrize("position", range(9))
async def test_any_position_of_a_finished_stream(scene: Scene, position: int) -> None:
    stop = TOKENIZER.decode(expected_tokens(PROMPT, 8)[5:8])
    wanted = request(request_id="r1", max_tokens=20, stop=[stop], prompt_logprobs=0)
    whole = await scene.collect(wanted, resumable=True)
    before = Collected()
    # a client that got the tokens before the position has their text, as it was cut then
    for chunk in whole.chunks:
        if chunk.outputs[0].position < position:
            before.add(chunk)
    assert len(before.token_ids.get(0, [])) == position
    before.ends.clear()
    rest = await resumed(scene, request_id="r1", next_position=position)
    for chunk in rest:
        before.add(chunk)
    assert before.token_ids == whole.token_ids
    assert before.texts == whole.texts
    assert before.ends[0].stop_match == stop
    assert rest[-1].usage == whole.last.usage
    assert rest[-1].receipt == whole.last.receipt
    assert rest[0].resolved_sampling == whole.chunks[0].resolved_sampling
    assert bool(rest[0].prompt_logprobs) == (position == 0)


async def test_outputs_resume_at_their_own_positions(scene: Scene) -> None:
    await scene.collect(request(request_id="r1", n=3, max_tokens=6), resumable=True)
    rest = Collected(token_ids={index: [0] * (2 + 2 * index) for index in range(3)})
    for chunk in await resumed(scene, request_id="r1", next_position=2, next_positions={1: 4, 2: 6}):
        rest.add(chunk)
    assert {index: tokens[2 + 2 * index :] for index, tokens in rest.token_ids.items()} == {
        index: expected_tokens(PROMPT, 6, index)[2 + 2 * index :] for index in range(3)
    }
    assert set(rest.ends) == {0, 1, 2}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"next_position": 7}, "next_position"),
        ({"next_positions": {0: 9}}, "next_positions[0]"),
        ({"next_positions": {1: 0}}, "next_positions[1]"),
        ({"request_id": ""}, "request_id"),
    ],
)
async def test_positions_that_cannot_be(scene: Scene, fields: dict[str, Any], field: str) -> None:
    await scene.collect(request(request_id="r1"), resumable=True)
    with pytest.raises(RpcError) as error:
        await resumed(scene, **{"request_id": "r1", **fields})
    assert (error.value.code, error.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_an_unknown_request_is_not_found(scene: Scene) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await scene.stub.Resume(inference_pb2.ResumeRequest(request_id="nobody")).read()
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


async def test_the_same_request_again_attaches_and_gets_the_same(scene: Scene) -> None:
    pace = paced(scene)
    wanted = request(request_id="r1", max_tokens=8)
    first = scene.gateway.generate(wanted, resumable=True)
    one, two = Collected(), Collected()
    pace.release()
    await read_until(first, one, 2)
    second = scene.gateway.generate(wanted, resumable=True)
    await read_until(second, two, 2)
    for _ in range(20):
        pace.release()
    for stream, collected in ((first, one), (second, two)):
        async for chunk in stream:
            collected.add(chunk)
    three = await scene.collect(wanted, resumable=True)
    for collected in (one, two, three):
        assert collected.token_ids[0] == expected_tokens(PROMPT, 8)
        assert collected.chunks[0].resolved_sampling == one.chunks[0].resolved_sampling
        assert collected.texts == one.texts
        assert collected.last.receipt == one.last.receipt
    assert len(scene.decode.conversations) == 1


async def test_another_request_under_the_same_id_is_refused(scene: Scene) -> None:
    await scene.collect(request(request_id="r1"), resumable=True)
    with pytest.raises(RpcError) as error:
        await scene.collect(request(request_id="r1", top_k=3), resumable=True)
    assert (error.value.code, error.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, "request_id")


async def test_one_clients_id_means_nothing_to_another(scene: Scene) -> None:
    await scene.collect(request(request_id="r1"), resumable=True, owner="alice")
    with pytest.raises(RpcError) as error:
        await resumed(scene, request_id="r1")
    assert error.value.code == grpc.StatusCode.NOT_FOUND
    await scene.collect(request(request_id="r1", max_tokens=2), resumable=True, owner="bob")
    assert len(scene.decode.conversations) == 2


async def test_without_a_window_a_request_ends_with_its_client() -> None:
    async with scene_of(resume_window_s=0) as scene:
        paced(scene)
        chunks = scene.gateway.generate(request(request_id="r1"), resumable=True)
        await anext(chunks)
        await chunks.aclose()
        await scene.idle()
        with pytest.raises(RpcError) as error:
            await resumed(scene, request_id="r1")
        assert error.value.code == grpc.StatusCode.NOT_FOUND


async def test_a_client_that_comes_back_stops_the_clock() -> None:
    async with scene_of(resume_window_s=0.1) as scene:
        pace = paced(scene)
        chunks = scene.gateway.generate(request(request_id="r1"), resumable=True)
        await anext(chunks)
        await chunks.aclose()
        task = asyncio.create_task(resumed(scene, request_id="r1", next_position=1))
        done, _ = await asyncio.wait({task}, timeout=0.3)
        assert not done
        for _ in range(9):
            pace.release()
        rest = await task
        assert [token for chunk in rest for token in chunk.outputs[0].token_ids] == expected_tokens(PROMPT, 6)[1:]


async def test_a_failed_request_may_be_tried_anew(scene: Scene) -> None:
    usual = scene.decode.script

    async def refuse(worker: Any, conversation: Conversation):
        raise unavailable("draining")
        yield

    scene.decode.script = refuse
    with pytest.raises(RpcError):
        await scene.collect(request(request_id="r1"), resumable=True)
    scene.decode.script = usual
    again = await scene.collect(request(request_id="r1"), resumable=True)
    assert again.token_ids[0] == expected_tokens(PROMPT, 6)


async def test_a_request_without_an_id_is_not_kept(scene: Scene) -> None:
    await scene.collect(request(), resumable=True)
    await scene.collect(request(request_id="r1"))  # nor one over a port that cannot resume
    assert len(scene.gateway._records) == 0


# -- the parts --------------------------------------------------------------------------------------------------------


def make_record(*, keep: bool, logprobs: int | None = None) -> tuple[Record, Output]:
    output = Output(0, TOKENIZER, [], 0)
    return Record("r", [output], types_pb2.SamplingParams(logprobs=logprobs), keep=keep), output


async def nothing() -> None:
    await asyncio.Event().wait()


async def test_records_are_bounded_and_the_oldest_finished_one_goes_first() -> None:
    store = RecordStore(60, max_records=2)
    task = asyncio.create_task(nothing())
    records = {}
    for name in ("a", "b"):
        records[name], _ = make_record(keep=True)
        store.add(("", name), b"", records[name], task)
    with pytest.raises(RpcError) as error:
        store.make_room()
    assert error.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    records["b"].finish(inference_pb2.GenerateResponse())
    store.ended(("", "b"))
    store.make_room()
    assert store.find(("", "b"), b"") is None
    assert store.find(("", "a"), b"") == (records["a"], task)
    store.close()
    assert len(store) == 0
    task.cancel()


async def test_a_client_that_does_not_read_stops_the_request() -> None:
    record, output = make_record(keep=False)
    chunks = record.read()
    output.accept(0, [70], [], NOT_YET)
    await anext(chunks)
    await record.room()
    for start in range(1, 70_000, 1000):
        output.accept(start, [70] * 1000, [], NOT_YET)
    waiting = asyncio.create_task(record.room())
    done, _ = await asyncio.wait({waiting}, timeout=0.05)
    assert not done
    sizes = [len((await anext(chunks)).outputs[0].token_ids) for _ in range(2)]
    await waiting
    assert sizes == [16_384, 16_384]
    assert len(output.texts) == len(output.token_ids) - 1 - sum(sizes)
    await chunks.aclose()


async def test_alternatives_count_in_the_bounds() -> None:
    record, output = make_record(keep=True, logprobs=62)
    output.accept(0, [70] * 5000, [types_pb2.PositionLogprobs()] * 5000, LENGTH)
    record.finish(inference_pb2.GenerateResponse(usage=types_pb2.Usage(completion_tokens=5000)))
    chunks = [chunk async for chunk in record.read()]
    assert {len(chunk.outputs[0].token_ids) for chunk in chunks[:-1]} == {256}
    assert [chunk.HasField("usage") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    # a reader that comes back finds the newest, and is told when what it wants is gone
    assert output.first_kept == 5000 - 4096
    newest = [chunk async for chunk in record.read({0: 4999})]
    assert [len(chunk.outputs[0].token_ids) for chunk in newest] == [1]
    with pytest.raises(RpcError) as error:
        await anext(record.read())
    assert error.value.code == grpc.StatusCode.NOT_FOUND
