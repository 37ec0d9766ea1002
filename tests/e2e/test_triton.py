"""The service with every op in Triton: interpreted where there is no GPU, and then very slow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tandem.v1 import inference_pb2, types_pb2

from tests.cluster import Cluster


def request(**sampling: object) -> inference_pb2.GenerateRequest:
    ids = inference_pb2.TokenIds(ids=[5, 6, 7, 8] * 5)
    params = types_pb2.SamplingParams(max_tokens=4, ignore_eos=True, **sampling)  # pyright: ignore[reportArgumentType]
    return inference_pb2.GenerateRequest(token_ids=ids, sampling=params)


@pytest.mark.parametrize(
    "on", [pytest.param("interpreted", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
async def test_a_handoff_and_a_local_prefill_give_the_same(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, on: str
) -> None:
    if on == "interpreted":
        if torch.cuda.is_available():
            pytest.skip("kernels are compiled for the GPU of this machine")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    requests = [request(temperature=0), request(temperature=1.0, seed=7, n=2, repetition_penalty=1.2)]
    settings = {"decode.max_running": 4, "prefill.max_running": 2, "device": "cuda" if on == "cuda" else "cpu"}
    answers = []
    for prefill in (1, 0):
        async with Cluster(model=str(tiny_model("llama")), prefill=prefill, settings=settings) as cluster:
            [line] = [line for line in cluster.log if "decode_worker serves" in line]
            assert "ops in Triton" in line
            answers.append([await cluster.generate(each) for each in requests])
            await cluster.settled()
    for handed_over, local in zip(*answers, strict=True):
        assert handed_over.outputs == local.outputs
        assert all(len(output.token_ids) == 4 for output in local.outputs.values())
