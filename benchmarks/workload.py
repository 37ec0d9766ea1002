"""What a load generator sends: prompts, lengths and arrival times, the same for the same seed.

random    prompts of exactly `input_tokens` random words of the vocabulary
text      English sentences with the length distribution of shared chat logs (log-normal, long tail)
azure     lengths and arrivals of the Azure LLM inference trace 2023 (Microsoft, CC-BY 4.0), scaled down
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

TRACE = Path(__file__).parent / "data" / "azure_conv.csv"
# below stand special tokens; the default model's vocabulary has 49,152 entries, ids above are rare words
FIRST_TOKEN, LAST_TOKEN = 100, 40_000
# a small vocabulary of common words, each one token
_SENTENCE = (
    "river model paper light window number city return value engine history music water small under "
    "because while people garden winter question answer machine letter market bridge simple science "
    "morning travel language reason coffee family system design story future mountain school doctor table "
    "picture method signal forest summer"
)
WORDS = _SENTENCE.split()


@dataclass(frozen=True)
class Request:
    """One request of a workload. Either token ids or text."""

    arrival_s: float  # seconds after the start; 0 = as soon as the concurrency allows
    token_ids: tuple[int, ...] | None
    text: str | None
    output_tokens: int


@dataclass(frozen=True)
class Shape:
    """Sizes of a workload. `scale` shrinks the lengths of a trace, `speed` its arrival times."""

    num_requests: int
    input_tokens: int = 128
    output_tokens: int = 128
    range_ratio: float = 0.0  # lengths vary uniformly by this part of themselves, [0, 1)
    scale: float = 1.0
    speed: float = 1.0
    max_tokens: int = 1900  # no prompt and output of a trace exceed this together
    seed: int = 0


def random_workload(shape: Shape) -> list[Request]:
    """Prompts of random token ids."""
    rng = random.Random(shape.seed)

    def around(tokens: int) -> int:
        spread = int(tokens * shape.range_ratio)
        return max(1, rng.randint(tokens - spread, tokens + spread))

    return [
        Request(0.0, _token_ids(rng, around(shape.input_tokens)), None, around(shape.output_tokens))
        for _ in range(shape.num_requests)
    ]


def text_workload(shape: Shape) -> list[Request]:
    """English sentences; the median prompt has about `input_tokens` tokens, the median answer `output_tokens`."""
    rng = random.Random(shape.seed)
    requests = []
    for _ in range(shape.num_requests):
        # shared chat logs are close to log-normal with sigma about 1
        words = max(3, min(int(shape.input_tokens * math.exp(rng.gauss(0, 0.9))), shape.max_tokens // 2))
        answer = max(1, min(int(shape.output_tokens * math.exp(rng.gauss(0, 0.7))), shape.max_tokens // 2))
        requests.append(Request(0.0, None, " ".join(rng.choice(WORDS) for _ in range(words)), answer))
    return requests


def azure_workload(shape: Shape) -> list[Request]:
    """The first requests of the trace, arrivals included."""
    rng = random.Random(shape.seed)
    requests = []
    for row in _trace():
        if len(requests) == shape.num_requests:
            break
        prompt = max(1, int(int(row["prompt_tokens"]) * shape.scale))
        answer = max(1, int(int(row["output_tokens"]) * shape.scale))
        answer = min(answer, shape.max_tokens // 2)
        prompt = min(prompt, shape.max_tokens - answer)
        requests.append(Request(float(row["arrival_s"]) / shape.speed, _token_ids(rng, prompt), None, answer))
    return requests


def poisson_arrivals(requests: list[Request], rate: float, seed: int) -> list[Request]:
    """The same requests arriving `rate` times a second, at random."""
    rng = random.Random(seed + 1)
    now = 0.0
    spread = []
    for request in requests:
        spread.append(Request(now, request.token_ids, request.text, request.output_tokens))
        now += rng.expovariate(rate)
    return spread


def _token_ids(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(length))


def _trace() -> Iterator[dict[str, str]]:
    with TRACE.open() as file:
        yield from csv.DictReader(line for line in file if not line.startswith("#"))


WORKLOADS: dict[str, Callable[[Shape], list[Request]]] = {
    "random": random_workload,
    "text": text_workload,
    "azure": azure_workload,
}
