"""The running service in float32 against transformers: the same greedy tokens, the same log-probabilities."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tandem.v1 import inference_pb2, types_pb2
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.cluster import DEFAULT_MODEL_POOLS, Cluster
from tests.e2e import prompts

MAX_TOKENS = 12
# two float32 implementations that sum in different orders; a wrong position or mask is off by 1e-2 and more
LOGPROB_TOLERANCE = 2e-3


async def assert_equal(cluster: Cluster, model: PreTrainedModel, request: inference_pb2.GenerateRequest) -> None:
    request.sampling.CopyFrom(
        types_pb2.SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=3, ignore_eos=True)
    )
    result = await cluster.generate(request)
    prompt = await cluster.token_ids(request)
    output = result.outputs[0]
    assert len(output.token_ids) == MAX_TOKENS
    with torch.inference_mode():
        # Every position at once. Where each token is the most likely after those before it, they are the greedy ones.
        logits = model(torch.tensor([[*prompt, *output.token_ids[:-1]]])).logits[0, len(prompt) - 1 :]
    assert output.token_ids == logits.argmax(-1).tolist()
    for position, row in zip(output.logprobs, logits, strict=True):
        logprobs = torch.log_softmax(row.double(), dim=-1)
        assert position.chosen.logprob == pytest.approx(
            float(logprobs[position.chosen.token_id]), abs=LOGPROB_TOLERANCE
        )
        for top in position.top:
            assert top.logprob == pytest.approx(float(logprobs[top.token_id]), abs=LOGPROB_TOLERANCE)
    assert result.usage.prompt_tokens == len(prompt)
    assert result.usage.completion_tokens == MAX_TOKENS


@pytest.fixture(scope="module")
async def service(default_model: Path) -> Cluster:
    async with Cluster(model=str(default_model), settings={"dtype": "float32", **DEFAULT_MODEL_POOLS}) as cluster:
        yield cluster


# every fourth is quick, and the last is the longest
NUM_REQUESTS = len(prompts.requests())
NUMBERS = [
    pytest.param(number, marks=[pytest.mark.slow] * (number % 4 or number == NUM_REQUESTS - 1))
    for number in range(NUM_REQUESTS)
]


@pytest.mark.parametrize("number", NUMBERS)
async def test_default_model(service: Cluster, default_reference: PreTrainedModel, number: int) -> None:
    await assert_equal(service, default_reference, prompts.requests()[number])


@pytest.mark.parametrize(
    "family", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "qwen2")), "qwen3"]
)
async def test_other_families(family: str, tiny_model) -> None:
    folder = tiny_model(family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    vocabulary = model.config.vocab_size
    async with Cluster(model=str(folder), settings={"dtype": "float32"}) as cluster:
        for length in (1, 15, 16, 17, 55, 100):
            ids = [token % vocabulary for token in prompts.token_ids(length)]
            await assert_equal(cluster, model, inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=ids)))
