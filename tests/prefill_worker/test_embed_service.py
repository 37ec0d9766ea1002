"""EmbedTokens over real gRPC, and the engine below it."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import torch
from tandem.v1 import prefill_pb2, prefill_pb2_grpc
from transformers import AutoModel

from shared.config import ConfigError, load_config
from shared.engine import EncoderEngine, EnginePlan
from shared.model_store import ModelStore
from shared.policies.policy import UnsupportedModelError
from shared.rpc import RpcError, from_grpc
from tests.tiny_encoders import minilm, tiny_encoder
from tests.tiny_models import tiny_model
from tests.workers import running_worker, settled


@pytest.fixture(scope="module")
async def embedder() -> AsyncIterator[grpc.aio.Channel]:
    async with running_worker("prefill", tiny_encoder(), batch_tokens=40, chunk_tokens=40) as (_, channel):
        yield channel


def ask(*sequences: list[int], **fields: object) -> prefill_pb2.EmbedTokensRequest:
    return prefill_pb2.EmbedTokensRequest(
        sequences=[prefill_pb2.TokenSequence(token_ids=ids) for ids in sequences],
        **fields,  # pyright: ignore[reportArgumentType]
    )


async def embed(channel: grpc.aio.Channel, request: prefill_pb2.EmbedTokensRequest) -> prefill_pb2.EmbedTokensResponse:
    return await prefill_pb2_grpc.PrefillServiceStub(channel).EmbedTokens(request)


async def failure(channel: grpc.aio.Channel, request: prefill_pb2.EmbedTokensRequest) -> RpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await embed(channel, request)
    return from_grpc(error.value)


async def test_vectors_have_the_same_bits_beside_any_others(embedder: grpc.aio.Channel) -> None:
    texts = [list(range(5, 5 + length)) for length in (1, 17, 39, 60, 80)]
    together = await embed(embedder, ask(*texts))
    alone = await asyncio.gather(*(embed(embedder, ask(text)) for text in texts))
    assert [reply.vectors[0] for reply in alone] == list(together.vectors)
    assert together.compute_s > 0 <= together.queue_s
    assert together.worker_id
    await settled(embedder)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (ask(), "sequences"),
        (ask(*[[5]] * 2049), "sequences"),
        (ask([5], []), "sequences[1].token_ids"),
        (ask([5], [5] * 81), "sequences[1].token_ids"),
        (ask([384]), "sequences[0].token_ids"),
        (ask([5], dimensions=65), "dimensions"),
    ],
)
async def test_what_is_wrong_is_named(
    embedder: grpc.aio.Channel, request_: prefill_pb2.EmbedTokensRequest, field: str
) -> None:
    error = await failure(embedder, request_)
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_each_kind_of_worker_says_what_it_does(embedder: grpc.aio.Channel) -> None:
    assert (await failure(embedder, ask([5], model="another"))).code == grpc.StatusCode.NOT_FOUND
    call = prefill_pb2_grpc.PrefillServiceStub(embedder).Prefill(prefill_pb2.PrefillRequest(token_ids=[5]))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call.read()
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    async with running_worker("prefill", tiny_model("llama")) as (_, generating):
        refused = await failure(generating, ask([5]))
        assert refused.code == grpc.StatusCode.FAILED_PRECONDITION
        assert "call Prefill" in refused.message


def plan(model: Path | str, role: str = "prefill", **overrides: object) -> EnginePlan:
    config = load_config(None, {"model": str(model), "dtype": "float32", **overrides})
    section = config.prefill if role == "prefill" else config.decode
    return EnginePlan.of(config, section, ModelStore().resolve(str(model)))


def test_a_plan_says_what_is_not_served() -> None:
    with pytest.raises(ConfigError, match="prefill workers do alone"):
        plan(tiny_encoder(), "decode")
    for kind in ("clip_text", "clip_vision"):
        with pytest.raises(UnsupportedModelError, match="is not served"):
            plan(tiny_encoder(kind))
    with pytest.raises(ConfigError, match="max_context"):
        plan(tiny_encoder(), max_context=81)
    assert (plan(tiny_encoder()).max_context, plan(tiny_encoder()).num_blocks) == (80, 1)


@torch.inference_mode()
def test_pooling_is_the_folders_in_the_store_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cls"
    shutil.copytree(tiny_encoder(), folder)
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [{"path": f"{i}_{kind}" if i else "", "type": f"models.{kind}"} for i, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 33}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    ModelStore().pull(str(folder), name="pulled")
    model = AutoModel.from_pretrained(folder).eval()
    text = list(range(5, 25))
    for source in (folder, "pulled"):
        own = plan(source)
        assert own.pooling is not None
        assert (own.pooling.normalizes, own.max_context) == (True, 33)
        assert plan(source, max_context=80).max_context == 80
        engine = EncoderEngine(own, own.pooling)
        expected = model(torch.tensor([text])).last_hidden_state[:, 0]
        torch.testing.assert_close(engine.encode([text]), expected, rtol=1e-4, atol=1e-4)
        engine.close()


@torch.inference_mode()
def test_minilm_gives_the_vectors_of_its_own_code() -> None:
    files = minilm()
    own = plan("all-minilm-l6-v2")
    assert own.pooling is not None
    assert (own.pooling.mode, own.pooling.normalizes, own.max_context) == ("mean", True, 256)
    engine = EncoderEngine(own, own.pooling)
    texts = [[101, 2129, 2116, 2111, 102], [101, 102], [101, *range(2000, 2200), 102]]
    model = AutoModel.from_pretrained(files.folder).eval()
    expected = torch.stack([model(torch.tensor([text])).last_hidden_state[0].mean(0) for text in texts])
    found = engine.encode(texts)
    torch.testing.assert_close(
        torch.nn.functional.normalize(found), torch.nn.functional.normalize(expected), rtol=0, atol=1e-5
    )
    for text, vector in zip(texts, found, strict=True):
        assert torch.equal(engine.encode([text])[0], vector)
    engine.close()
