"""One request through scripted workers: the order of the hops, and what the client sees of it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import grpc
import pytest
from tandem.v1 import inference_pb2, types_pb2

from shared.rpc import RpcError
from tests.scripted_scene import Scene, request, scene_of
from tests.scripted_workers import BLOCK_TOKENS, TOKENIZER, Conversation, expected_tokens

PROMPT = TOKENIZER.encode("hello world")


async def test_the_hops_of_a_request(scene: Scene) -> None:
    collected = await scene.collect(request(max_tokens=6))
    await scene.idle()
    assert collected.token_ids[0] == expected_tokens(PROMPT, 6)
    assert collected.texts[0] == TOKENIZER.decode(collected.token_ids[0])
    assert collected.ends[0].finish_reason == types_pb2.FINISH_REASON_LENGTH
    [conversation], [prefill] = scene.decode.conversations, scene.prefill.requests
    assert list(conversation.admit.token_ids) == list(prefill.token_ids) == PROMPT
    assert conversation.admit.num_prompt_tokens == prefill.num_prompt_tokens == len(PROMPT)
    assert [step.attempt for step in conversation.imports] == [1]
    assert conversation.imports[0].extent.num_tokens == len(PROMPT)
    assert conversation.begin is not None
    assert [token.token_id for token in conversation.begin.first_tokens] == expected_tokens(PROMPT, 1)


async def test_first_and_last_message(scene: Scene) -> None:
    collected = await scene.collect(request(max_tokens=4, request_id="mine", logprobs=0))
    first, last = collected.chunks[0], collected.last
    assert first.request_id == "mine"
    assert first.resolved_sampling.max_tokens == 4
    assert first.resolved_sampling.temperature == 0.5
    assert first.resolved_sampling.HasField("seed")
    assert first.outputs[0].position == 0
    assert not any(chunk.request_id for chunk in collected.chunks[1:])
    assert not any(chunk.HasField("usage") for chunk in collected.chunks[:-1])
    assert last.outputs[0].finish_reason
    assert last.usage == types_pb2.Usage(prompt_tokens=len(PROMPT), cached_tokens=2, completion_tokens=4)
    receipt = last.receipt
    assert (receipt.prefill_workers, receipt.decode_workers) == (["p0#1"], ["d0#1"])
    assert (receipt.attempts, receipt.handoff_bytes, receipt.model_digest) == (1, 1000, "d1")
    assert receipt.transport == types_pb2.TRANSPORT_SHARED_MEMORY
    timings = last.timings
    assert 0 < timings.queue_s < timings.first_token_s < timings.total_s
    assert timings.queue_s + timings.prefill_s == pytest.approx(timings.first_token_s)
    assert timings.first_token_s + timings.decode_s == pytest.approx(timings.total_s)
    assert [position.chosen.token_id for position in collected.logprobs[0]] == collected.token_ids[0]
    assert [position.chosen.text for position in collected.logprobs[0]] == list(collected.texts[0])


async def test_prompt_logprobs_come_with_the_first_token(scene: Scene) -> None:
    collected = await scene.collect(request(prompt_logprobs=0))
    texts = [position.chosen.text for position in collected.chunks[0].prompt_logprobs]
    assert "".join(texts) == TOKENIZER.decode(PROMPT[1:])
    assert not any(chunk.prompt_logprobs for chunk in collected.chunks[1:])


async def test_the_prefill_stream_ends_when_decode_has_the_blocks(scene: Scene) -> None:
    order: list[str] = []

    async def script(worker: object, conversation: Conversation):
        yield conversation.reserved()
        await conversation.read_until("begin")
        order.append(f"begin with {scene.prefill.open_streams} exports")
        yield conversation.imported()
        await scene.prefill.idle()
        order.append("export ended")
        histories = conversation.histories()
        while (reply := conversation.tokens(histories, 1)).tokens.outputs:
            yield reply

    scene.decode.script = script
    await scene.collect(request())
    assert order == ["begin with 1 exports", "export ended"]


async def test_blocks_that_decode_holds_are_not_handed_over(scene: Scene) -> None:
    async def script(worker: object, conversation: Conversation):
        yield conversation.reserved(held_tokens=BLOCK_TOKENS)
        await conversation.read_until("begin")
        yield conversation.imported()
        yield conversation.tokens(conversation.histories(), 99)

    scene.decode.script = script
    await scene.collect(request(PROMPT * 3))
    assert scene.prefill.requests[0].skip_tokens == BLOCK_TOKENS


async def test_one_token_needs_no_decode(scene: Scene) -> None:
    collected = await scene.collect(request(max_tokens=1))
    await scene.idle()
    assert collected.token_ids[0] == expected_tokens(PROMPT, 1)
    [conversation] = scene.decode.conversations
    assert (conversation.begin, conversation.imports) == (None, [])
    assert collected.last.receipt.transport == types_pb2.TRANSPORT_UNSPECIFIED
    assert (collected.last.receipt.prefill_workers, collected.last.receipt.decode_workers) == (["p0#1"], [])


async def test_several_outputs_share_one_leg(scene: Scene) -> None:
    collected = await scene.collect(request(n=3, max_tokens=5))
    assert collected.token_ids == {index: expected_tokens(PROMPT, 5, index) for index in range(3)}
    assert len(scene.decode.conversations) == len(scene.prefill.requests) == 1
    assert list(scene.prefill.requests[0].output_indices) == [0, 1, 2]
    assert collected.last.usage.completion_tokens == 15


@pytest.mark.parametrize("step", [1, 3, 50])
async def test_a_stop_string_ends_one_output_and_the_others_go_on(scene: Scene, step: int) -> None:
    scene.decode.step = step
    tokens = {index: expected_tokens(PROMPT, 12, index) for index in range(2)}
    stop = TOKENIZER.decode(tokens[0][4:7])
    other = TOKENIZER.decode(tokens[1])
    assert stop not in other
    collected = await scene.collect(request(n=2, max_tokens=12, stop=[stop]))
    assert collected.token_ids == {0: tokens[0][:7], 1: tokens[1]}
    assert collected.texts == {0: TOKENIZER.decode(tokens[0][:4]), 1: other}
    assert collected.ends[0].finish_reason == types_pb2.FINISH_REASON_STOP
    assert (collected.ends[0].stop_match, collected.ends[1].stop_match) == (stop, "")
    assert collected.last.usage.completion_tokens == 19


async def test_decode_is_told_which_outputs_need_no_more(scene: Scene) -> None:
    tokens = expected_tokens(PROMPT, 3)
    told: asyncio.Future[set[int]] = asyncio.get_running_loop().create_future()

    async def script(worker: object, conversation: Conversation):
        yield conversation.reserved()
        await conversation.read_until("begin")
        yield conversation.imported()
        histories = conversation.histories()
        yield conversation.tokens(histories, 2)
        await conversation.read_until("finish")
        told.set_result(conversation.finished)
        yield conversation.tokens({1: histories[1]}, 99)

    scene.decode.script = script
    collected = await scene.collect(request(n=2, max_tokens=9, stop=[TOKENIZER.decode(tokens)]))
    assert await told == {0}
    assert collected.token_ids[1] == expected_tokens(PROMPT, 9, 1)


async def test_a_stop_string_in_the_first_token(scene: Scene) -> None:
    tokens = [expected_tokens(PROMPT, 1, index)[0] for index in range(2)]
    assert tokens[0] != tokens[1]
    collected = await scene.collect(request(n=2, max_tokens=4, stop=[TOKENIZER.decode(tokens[:1])]))
    assert collected.token_ids[0] == tokens[:1]
    assert collected.texts[0] == ""
    begin = scene.decode.conversations[0].begin
    assert begin is not None
    assert [token.index for token in begin.first_tokens] == [1]


async def test_a_slow_client_gets_fewer_and_larger_chunks(scene: Scene) -> None:
    async with aclosing(scene.gateway.generate(request(max_tokens=200))) as chunks:
        first = await anext(chunks)
        await scene.decode.until(lambda: scene.decode.open_streams == 0 and bool(scene.decode.conversations))
        while scene.gateway.num_requests:
            await asyncio.wait(scene.gateway._tasks)
        rest = [chunk async for chunk in chunks]
    assert len(first.outputs[0].token_ids) + len(rest[0].outputs[0].token_ids) == 200
    assert len(rest) == 1
    assert rest[0].usage.completion_tokens == 200


async def test_short_uncached_prompts_stay_with_decode_when_configured() -> None:
    async with scene_of(local_prefill_tokens=len(PROMPT)) as scene:
        short = await scene.collect(request())
        assert short.token_ids[0] == expected_tokens(PROMPT, 6)
        assert short.last.receipt.transport == types_pb2.TRANSPORT_UNSPECIFIED
        assert (short.last.receipt.prefill_workers, short.last.receipt.attempts) == ([], 1)
        longer = await scene.collect(request([*PROMPT, 70]))
        assert longer.last.receipt.prefill_workers == ["p0#1"]


async def test_without_a_prefill_worker_decode_computes_the_prompt(scene: Scene) -> None:
    await scene.prefill.kill()
    await scene.gone(scene.prefill)
    collected = await scene.collect(request())
    assert collected.token_ids[0] == expected_tokens(PROMPT, 6)
    assert scene.decode.conversations[0].begin is not None
    assert scene.decode.conversations[0].begin.local_prefill


async def test_without_a_decode_worker_it_is_unavailable_at_once(scene: Scene) -> None:
    await scene.decode.kill()
    await scene.gone(scene.decode)
    assert not scene.gateway.serving
    with pytest.raises(RpcError) as error:
        await scene.collect(request())
    assert error.value.code == grpc.StatusCode.UNAVAILABLE
    assert error.value.retry_after_s is not None
    assert not scene.prefill.requests


async def test_the_gateway_passes_its_deadline_on() -> None:
    seen: list[float] = []

    async with scene_of() as scene:

        async def script(worker: object, conversation: Conversation):
            seen.append(conversation.context.time_remaining())
            yield conversation.reserved()
            await asyncio.Event().wait()

        scene.decode.script = script

        async def prefill(worker: object, request: object):
            await asyncio.Event().wait()
            yield

        scene.prefill.script = prefill
        with pytest.raises(RpcError, match="while its prompt was computed") as error:
            await scene.collect(request(), budget_s=0.2)
        assert error.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
        await scene.idle()
        assert 0 < seen[0] < 0.21, "the header of a timeout is rounded up"


@pytest.mark.parametrize("tokens_read", [0, 1, 3])
async def test_a_client_that_goes_ends_both_streams(scene: Scene, tokens_read: int) -> None:
    scene.decode.script = lambda worker, conversation: worker.generate_then_hang(conversation, 4)
    call = scene.stub.Generate(request(max_tokens=50))
    if tokens_read == 0:
        await scene.decode.until(lambda: scene.decode.open_streams == 1)
    for _ in range(tokens_read):
        await call.read()
    call.cancel()
    await scene.decode.until(lambda: bool(scene.decode.conversations))
    await scene.idle()
    assert scene.gateway._admission.running == 0


async def test_over_the_wire(scene: Scene) -> None:
    chunks: list[inference_pb2.GenerateResponse] = [chunk async for chunk in scene.stub.Generate(request())]
    assert [token for chunk in chunks for token in chunk.outputs[0].token_ids] == expected_tokens(PROMPT, 6)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await scene.stub.Generate(request(top_p=3)).read()
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    models = await scene.stub.ListModels(inference_pb2.ListModelsRequest())
    assert [(model.name, model.family, model.dtype, model.chat) for model in models.models] == [
        ("scripted", "hash", "float32", True)
    ]
    tokenized = await scene.stub.Tokenize(inference_pb2.TokenizeRequest(text="hello world"))
    assert (list(tokenized.token_ids), tokenized.rendered) == (PROMPT, "hello world")
    text = await scene.stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=PROMPT))
    assert text.text == "hello world"
