"""The whole service, a process for each role, with random weights of a model's shape: latencies, and that the answers
to many requests at once are those to each of them alone."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.driver import GrpcDriver, Record
from benchmarks.gpu.results import ANSWERS, Figure, Results
from benchmarks.gpu.shapes import Config, RandomCheckpoint, Sizes, device
from benchmarks.report import summarise
from benchmarks.serve import run as drive
from benchmarks.workload import Request, Shape, random_workload
from cli.supervisor import Supervisor

PART = "service"
_FIGURES = {"median_ttft_ms": "ms", "median_tpot_ms": "ms", "output_throughput": "tokens/s"}
_NAMES = {"median_ttft_ms": "TTFT", "median_tpot_ms": "TPOT", "output_throughput": "output"}


def run(results: Results, sizes: Sizes) -> None:
    """Adds every figure, model by model."""
    at_once, prompt_tokens, new_tokens = sizes.requests
    requests = random_workload(Shape(at_once, prompt_tokens, new_tokens))
    for name, config in sizes.served.items():
        same = f"{name}: answers that are the same alone"
        with results.attempt(PART, same, ANSWERS, 1.0), tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), config)
            together, alone, seconds = asyncio.run(_serve(folder, requests))
            failed = {record.error for record in (*together, *alone) if record.error}
            if failed:
                raise RuntimeError("; ".join(sorted(failed)))
            summary = summarise(together, seconds)
            for figure, unit in _FIGURES.items():
                what = f"{name}: {_NAMES[figure]}, {at_once} requests of {prompt_tokens} tokens at once"
                results.add(PART, Figure(what, summary[figure], unit))
            equal = [one.token_ids == other.token_ids for one, other in zip(together, alone, strict=True)]
            note = f"{sum(equal)} of {len(equal)}, {new_tokens} tokens each"
            results.add(PART, Figure(same, sum(equal) / len(equal), ANSWERS, 1.0, note))


def write_model(folder: Path, config: Config) -> None:
    """A checkpoint of random weights, with a tokenizer to which every token is a word."""
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 0}))
    checkpoint = RandomCheckpoint(config, device())
    save_file({name: checkpoint.tensor(name).cpu() for name in checkpoint.names()}, folder / "model.safetensors")
    words = {f"w{token}": token for token in range(config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


async def _serve(folder: str, requests: list[Request]) -> tuple[list[Record], list[Record], float]:
    """The answers to all at once, to one after another, and the seconds that the former took."""
    async with serving(folder) as driver:
        for warm_up in random_workload(Shape(2, requests[0].output_tokens, 4, seed=1)):
            await driver.send(warm_up)
        together, seconds = await drive(driver, requests, concurrency=len(requests))
        alone = [await driver.send(request) for request in requests]
    return together, alone, seconds


@asynccontextmanager
async def serving(
    folder: str,
    *,
    prefill: bool = True,
    settings: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
) -> AsyncIterator[GrpcDriver]:
    """A gateway, a decode worker, and a prefill worker or none: then the decode worker computes prompts too."""
    common = {"model": folder, "device": device(), "drain_s": 0, **(settings or {})}
    # where there is no GPU the ops are C: the interpreter would take minutes
    async with Supervisor(settings=common, env={"TRITON_INTERPRET": "0", **(env or {})}) as supervisor:
        workers = [supervisor.start("decode_worker", {"decode.port": 0})]
        if prefill:
            workers.append(supervisor.start("prefill_worker", {"prefill.port": 0}))
        await asyncio.gather(*workers)
        gateway = await supervisor.start("gateway", {"gateway.port": 0, "gateway.http_port": 0})
        async with GrpcDriver(gateway.grpc) as driver:
            yield driver
