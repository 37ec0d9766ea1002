"""`tandem bench`: drives a running server with a workload and reports its latencies.

tandem bench --workload random --input 512 --output 64 --concurrency 8 --requests 32
tandem bench --workload azure --scale 0.1 --speed 2 --requests 100 --goodput ttft=500 --goodput tpot=50
tandem bench --transport http --url http://127.0.0.1:8101 --model smollm2     # any OpenAI server, the same client
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.driver import Driver, GrpcDriver, HttpDriver, Record
from benchmarks.report import draw, summarise, table, write_json
from benchmarks.workload import WORKLOADS, Request, Shape, poisson_arrivals


async def run(
    driver: Driver, requests: Sequence[Request], *, concurrency: int, cancel_ratio: float = 0.0, seed: int = 0
) -> tuple[list[Record], float]:
    """Sends each request at its arrival time, at most `concurrency` at once; returns the records and seconds taken.

    cancel_ratio: part of the requests that are cancelled after a random number of tokens.
    """
    rng = random.Random(seed)
    places = asyncio.Semaphore(concurrency)
    start = time.perf_counter()

    async def one(request: Request, cancel_after: int | None) -> Record:
        wait_s = start + request.arrival_s - time.perf_counter()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        async with places:
            return await driver.send(request, cancel_after=cancel_after)

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(one(r, rng.randint(1, r.output_tokens) if rng.random() < cancel_ratio else None))
            for r in requests
        ]
    return [task.result() for task in tasks], time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 1 if a request failed."""
    options = _parser().parse_args(argv)
    shape = Shape(
        num_requests=options.requests,
        input_tokens=options.input,
        output_tokens=options.output,
        range_ratio=options.range_ratio,
        scale=options.scale,
        speed=options.speed,
        seed=options.seed,
    )
    requests = WORKLOADS[options.workload](shape)
    if options.rate:
        requests = poisson_arrivals(requests, options.rate, options.seed)
    goodput = dict(options.goodput or ())
    records, duration_s = asyncio.run(_drive(options, requests))
    result = {
        "backend": f"tandem-{options.transport}" if options.transport == "grpc" else "openai",
        "model_id": options.model,
        "label": options.label,
        "request_rate": options.rate or "inf",
        "max_concurrency": options.concurrency,
        **summarise(records, duration_s, goodput=goodput, detailed=options.detailed),
    }
    print(table(result))
    for error in sorted({record.error for record in records if record.error}):
        print("error:", error)
    if options.json:
        write_json(result, options.json)
    if options.png:
        draw(records, options.png, options.label or f"{options.workload}, {options.concurrency} at once")
    return int(result["failed"] > 0)


async def _drive(options: argparse.Namespace, requests: Sequence[Request]) -> tuple[list[Record], float]:
    driver: Any = (
        GrpcDriver(options.target, options.model)
        if options.transport == "grpc"
        else HttpDriver(options.url, options.model)
    )
    async with driver:
        return await run(
            driver,
            requests,
            concurrency=options.concurrency,
            cancel_ratio=options.cancel,
            seed=options.seed,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tandem bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transport", choices=("grpc", "http"), default="grpc")
    parser.add_argument("--target", default="127.0.0.1:50051", help="host:port of a gateway, for gRPC")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="base address of an OpenAI server, for HTTP")
    parser.add_argument("--model", default="", help="served name; empty = the default model")
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="random")
    parser.add_argument("--requests", type=int, default=32, help="number of requests")
    parser.add_argument("--input", type=int, default=128, help="prompt tokens (median for text)")
    parser.add_argument("--output", type=int, default=128, help="output tokens (median for text)")
    parser.add_argument("--range-ratio", type=float, default=0.0, help="random: spread of the lengths, 0 to 1")
    parser.add_argument("--scale", type=float, default=0.1, help="azure: factor on the lengths")
    parser.add_argument("--speed", type=float, default=1.0, help="azure: factor on the arrival rate")
    parser.add_argument("--rate", type=float, default=0.0, help="requests per second, Poisson; 0 = all at once")
    parser.add_argument("--concurrency", type=int, default=8, help="requests in progress at most")
    parser.add_argument("--cancel", type=float, default=0.0, help="part of the requests cancelled midway, 0 to 1")
    parser.add_argument("--goodput", action="append", type=_limit, metavar="METRIC=MS", help="ttft, tpot or e2el")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", default="")
    parser.add_argument("--json", type=Path, help="write the result, with vllm bench serve's field names")
    parser.add_argument("--detailed", action="store_true", help="with one entry for each request in the JSON")
    parser.add_argument("--png", type=Path, help="draw the percentiles")
    return parser


def _limit(text: str) -> tuple[str, float]:
    metric, _, limit = text.partition("=")
    if metric not in ("ttft", "tpot", "e2el"):
        raise argparse.ArgumentTypeError(f"{metric!r} is not one of ttft, tpot, e2el")
    return metric, float(limit)


if __name__ == "__main__":
    raise SystemExit(main())
