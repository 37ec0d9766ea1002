"""The registry of workers: who fits, who is alive, who is chosen, and what is known before the first request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from pydantic import SecretStr
from tandem.v1 import types_pb2

from gateway.workers import StartError
from shared.rpc import RpcError
from shared.transport.wire import FIXED_FIELDS
from tests.scripted_scene import Scene, request, scene_of
from tests.scripted_workers import TOKENIZER, Conversation, ScriptedDecode, ScriptedPrefill

PROMPT = TOKENIZER.encode("hello world")
LAYOUT_FIELDS = {
    "contract_version": 3,
    "dtype": "bfloat16",
    "num_layers": 3,
    "num_kv_heads": 2,
    "head_dim": 16,
    "block_tokens": 8,
    "order": "layers,blocks",
    "digest": "other",
    "first_kv_head": 1,
}


async def start_error(prepare: Callable[[Scene], None], **options: Any) -> str:
    with pytest.raises(StartError) as error:
        async with scene_of(prepare=prepare, **options):
            pass
    return str(error.value)


# -- who fits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", LAYOUT_FIELDS)
async def test_each_field_of_the_layout_must_agree_within_a_role(field: str) -> None:
    def prepare(scene: Scene) -> None:
        scene.prefills[1].layout = {field: LAYOUT_FIELDS[field]}

    assert f"layout.{field}: " in await start_error(prepare, prefill=2)


@pytest.mark.parametrize("field", LAYOUT_FIELDS)
async def test_between_roles_what_is_converted_may_differ(field: str) -> None:
    def prepare(scene: Scene) -> None:
        scene.prefill.layout = {field: LAYOUT_FIELDS[field]}

    if field in (*FIXED_FIELDS, "dtype"):
        assert f"layout.{field}: " in await start_error(prepare)
    else:
        async with scene_of(prepare=prepare) as scene:
            assert (await scene.collect(request("hello world"))).last.receipt.attempts == 1


async def test_dtypes_that_are_converted_if_that_is_asked_for() -> None:
    def prepare(scene: Scene) -> None:
        scene.prefill.layout = {"dtype": "bfloat16"}

    async with scene_of(prepare=prepare, transport={"convert_dtype": True}) as scene:
        assert (await scene.collect(request("hello world"))).last.receipt.attempts == 1


@pytest.mark.parametrize("which", ["prefill", "decode"])
async def test_the_models_digest_must_be_the_gateways(which: str) -> None:
    def prepare(scene: Scene) -> None:
        getattr(scene, which).layout = {"model_digest": "0123456789abcdef"}

    message = await start_error(prepare)
    assert "layout.model_digest: " in message
    assert "0123456789ab" in message


async def test_the_served_name_must_be_the_gateways() -> None:
    def prepare(scene: Scene) -> None:
        scene.decode.info = {"model": "another"}

    assert "model: the gateway serves 'scripted', the worker 'another'" in await start_error(prepare)


async def test_a_worker_in_the_wrong_list() -> None:
    def prepare(scene: Scene) -> None:
        scene.prefill.info = {"role": scene.decode.role}

    assert "role: expected WORKER_ROLE_PREFILL" in await start_error(prepare)


async def test_every_pair_shakes_hands_before_traffic() -> None:
    async with scene_of(prefill=2, decode=2) as scene:
        for decode in scene.decodes:
            assert set(decode.connects) == {prefill.target for prefill in scene.prefills}


async def test_a_lesser_transport_than_required_refuses_to_start() -> None:
    def prepare(scene: Scene) -> None:
        scene.decode.transport = types_pb2.TRANSPORT_INLINE

    message = await start_error(prepare, transport={"require": "shared_memory"})
    assert "transport.require: shared_memory is required" in message
    assert "another host" in message
    async with scene_of(prepare=prepare, transport={"require": "inline"}):
        pass
    async with scene_of(prepare=prepare):
        pass


async def test_a_decode_worker_that_requires_more_refuses_to_start() -> None:
    def prepare(scene: Scene) -> None:
        async def refuse(request: Any, context: grpc.aio.ServicerContext) -> None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "transport.require: no socket")

        scene.decode.Connect = refuse  # type: ignore[method-assign]

    assert await start_error(prepare) == "transport.require: no socket"


# -- coming and going -------------------------------------------------------------------------------------------------


async def test_a_worker_that_comes_back_is_described_anew(scene: Scene) -> None:
    await scene.prefill.kill()
    await scene.gone(scene.prefill)
    assert "p0#1" not in scene.gateway.metrics.render().decode()
    await scene.prefill.start()
    await scene.alive(scene.prefill)
    assert scene.prefill.worker_id == "p0#2"
    assert scene.decode.connects == [scene.prefill.target] * 2
    collected = await scene.collect(request())
    assert collected.last.receipt.prefill_workers == ["p0#2"]
    assert 'worker="p0#2"' in scene.gateway.metrics.render().decode()


async def test_a_worker_that_comes_back_with_another_layout_is_not_used(scene: Scene) -> None:
    await scene.prefill.kill()
    await scene.gone(scene.prefill)
    scene.prefill.layout = {"num_layers": 3}
    await scene.prefill.start()
    known = scene.gateway.workers._all[0]
    while known.fault is None:
        await scene.gateway.workers.changes.next()
    collected = await scene.collect(request())
    assert not collected.last.receipt.prefill_workers
    assert not scene.prefill.requests


async def test_all_may_come_back_with_another_layout(scene: Scene) -> None:
    for worker in (scene.prefill, scene.decode):
        await worker.kill()
        await scene.gone(worker)
    for worker in (scene.prefill, scene.decode):
        worker.layout = {"block_tokens": 8}
        await worker.start()
    await scene.alive(scene.prefill, scene.decode)
    assert scene.gateway.workers.layout.block_tokens == 8
    assert (await scene.collect(request())).last.receipt.prefill_workers == ["p0#2"]


async def test_a_pair_that_cannot_hand_over_is_not_chosen(scene: Scene) -> None:
    async def abort(request: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "layout.dtype: differs")

    await scene.prefill.kill()
    await scene.gone(scene.prefill)
    await scene.decode.kill()
    await scene.gone(scene.decode)
    scene.decode.Connect = abort  # type: ignore[method-assign]
    await scene.decode.start()
    await scene.prefill.start()
    await scene.alive(scene.prefill, scene.decode)
    collected = await scene.collect(request())
    assert not collected.last.receipt.prefill_workers
    assert collected.last.receipt.decode_workers == ["d0#2"]


async def test_health_follows_the_decode_workers(scene: Scene) -> None:
    assert scene.gateway.serving
    await scene.reported(scene.decode, draining=True)
    assert not scene.gateway.serving
    with pytest.raises(RpcError) as error:
        await scene.collect(request())
    assert error.value.code == grpc.StatusCode.UNAVAILABLE
    await scene.reported(scene.decode, free_blocks=1)
    assert scene.gateway.serving


async def test_the_clusters_key_goes_with_every_call() -> None:
    async with scene_of(auth={"cluster_key": SecretStr("secret")}) as scene:
        seen: list[Any] = []

        async def script(worker: ScriptedDecode, conversation: Conversation):
            seen.append(dict(conversation.context.invocation_metadata())["authorization"])
            async for reply in ScriptedDecode.generate(worker, conversation):
                yield reply

        scene.decode.script = script
        await scene.collect(request())
        assert {*seen, *scene.decode.keys, *scene.prefill.keys} == {"Bearer secret"}


async def test_the_context_is_what_every_worker_can_take() -> None:
    def prepare(scene: Scene) -> None:
        scene.prefill.info = {"max_context": 100}
        scene.decode.info = {"num_blocks": 20}

    async with scene_of(prepare=prepare) as scene:
        assert scene.gateway.models()[0].max_context == 80
        with pytest.raises(RpcError, match="context of 80 tokens") as error:
            await scene.collect(request([70] * 60, max_tokens=21))
        assert error.value.field == "sampling.max_tokens"


# -- who is chosen ----------------------------------------------------------------------------------------------------


async def test_the_idler_workers_are_chosen() -> None:
    async with scene_of(prefill=2, decode=2) as scene:
        await scene.reported(scene.prefills[0], queued_tokens=5000)
        await scene.reported(scene.decodes[0], running=30)
        for _ in range(3):
            receipt = (await scene.collect(request())).last.receipt
            assert (receipt.prefill_workers, receipt.decode_workers) == (["p1#1"], ["d1#1"])


async def test_prompts_that_decode_workers_compute_weigh_beside_their_requests() -> None:
    async with scene_of(prefill=0, decode=2) as scene:
        await scene.reported(scene.decodes[0], running=1, queued_tokens=5000)
        await scene.reported(scene.decodes[1], running=4)
        for number in range(3):
            assert (await scene.collect(request([70 + number] * 9))).last.receipt.decode_workers == ["d1#1"]


async def test_what_was_just_sent_counts_before_it_is_reported() -> None:
    async with scene_of(prefill=2, decode=2) as scene:
        for worker in scene.decodes:
            worker.script = lambda worker, conversation: worker.generate_then_hang(conversation, 1)
        tasks = [asyncio.create_task(scene.collect(request([70 + i] * 9))) for i in range(8)]
        for worker in scene.decodes:
            await worker.until(lambda worker=worker: worker.open_streams == 4)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await scene.idle()
        assert [worker.work_ahead for worker in scene.gateway.workers._all] == [0, 0, 0, 0]


async def test_a_prompt_goes_where_its_prefix_is() -> None:
    async with scene_of(prefill=3, decode=3) as scene:
        prompts = [[70 + i] * 40 for i in range(3)]
        first = [(await scene.collect(request(prompt))).last.receipt for prompt in prompts]
        assert len({receipt.prefill_workers[0] for receipt in first}) == 3
        for prompt, receipt in zip(reversed(prompts), reversed(first), strict=True):
            again = (await scene.collect(request([*prompt, 5, 6, 7]))).last.receipt
            assert again.prefill_workers == receipt.prefill_workers
            assert again.decode_workers == receipt.decode_workers


async def test_a_hanging_prefill_is_no_reason_to_wait_for_it() -> None:
    async with scene_of(prefill=2) as scene:

        async def hang(worker: ScriptedPrefill, item: Any):
            await asyncio.Event().wait()
            yield

        scene.prefills[0].script = hang
        task = asyncio.create_task(scene.collect(request([90] * 30)))
        await scene.prefills[0].until(lambda: scene.prefills[0].open_streams == 1)
        assert (await scene.collect(request([91] * 30))).last.receipt.prefill_workers == ["p1#1"]
        task.cancel()
        await asyncio.wait({task})
