"""Figures of a run: TTFT, TPOT, ITL, latency, throughput and goodput, under the field names of `vllm bench serve`."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.driver import Record

PERCENTILES = (50, 90, 95, 99)
METRICS = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2el": "latency",
}


def summarise(
    records: Sequence[Record], duration_s: float, *, goodput: Mapping[str, float] | None = None, detailed: bool = False
) -> dict[str, Any]:
    """The result of a run as JSON can hold it.

    duration_s: from the first request's start to the last one's end.
    goodput: milliseconds allowed for `ttft`, `tpot` or `e2el`; a request counts only if it keeps all of them.
    detailed: with one entry for each request.
    """
    done = [record for record in records if record.completed]
    samples = _samples_ms(done)
    result: dict[str, Any] = {
        "date": datetime.datetime.now().strftime("%Y%m%d-%H%M%S"),
        "num_prompts": len(records),
        "duration": duration_s,
        "completed": len(done),
        "failed": sum(bool(record.error) for record in records),
        "cancelled": sum(record.cancelled for record in records),
        "total_input_tokens": sum(record.prompt_tokens for record in done),
        "total_output_tokens": sum(record.output_tokens for record in done),
        "request_throughput": len(done) / duration_s,
        "output_throughput": sum(record.output_tokens for record in done) / duration_s,
        "total_token_throughput": sum(record.prompt_tokens + record.output_tokens for record in done) / duration_s,
        "request_goodput": sum(_good(record, goodput) for record in done) / duration_s if goodput else None,
    }
    for metric, values in samples.items():
        result |= _statistics(metric, values)
    if detailed:
        start = min((record.start_s for record in records), default=0.0)
        result |= {
            "input_lens": [record.prompt_tokens for record in records],
            "output_lens": [record.output_tokens for record in records],
            "ttfts": [record.ttft_s for record in records],
            "itls": [record.gaps_s for record in records],
            "latencies": [record.latency_s for record in records],
            "start_times": [record.start_s - start for record in records],
            "errors": [record.error for record in records],
        }
    return result


def table(result: Mapping[str, Any]) -> str:
    """The figures as text."""
    lines = [
        f"requests {result['completed']} completed, {result['failed']} failed, {result['cancelled']} cancelled "
        f"in {result['duration']:.2f} s",
        f"throughput {result['request_throughput']:.2f} requests/s, {result['output_throughput']:.1f} output tokens/s, "
        f"{result['total_token_throughput']:.1f} tokens/s",
    ]
    if result["request_goodput"] is not None:
        lines.append(f"goodput {result['request_goodput']:.2f} requests/s")
    lines.append(f"{'ms':<24}{'mean':>9}" + "".join(f"{f'p{p}':>9}" for p in PERCENTILES))
    for metric, name in METRICS.items():
        figures = [result[f"mean_{metric}_ms"], *(result[f"p{p}_{metric}_ms"] for p in PERCENTILES)]
        lines.append(f"{name:<24}" + "".join(f"{figure:9.1f}" for figure in figures))
    return "\n".join(lines)


def write_json(result: Mapping[str, Any], path: Path) -> None:
    """Writes a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def draw(records: Sequence[Record], path: Path, title: str) -> None:
    """Draws the percentiles of TTFT, TPOT and ITL into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    samples = _samples_ms([record for record in records if record.completed])
    for axis, metric in zip(axes, ("ttft", "tpot", "itl"), strict=True):
        values = samples[metric]
        if values:
            percentiles = np.linspace(0, 100, 201)
            axis.plot(percentiles, np.percentile(values, percentiles), color="tab:blue")
            for p in (50, 99):
                axis.axvline(p, color="lightgray", zorder=0)
        axis.set(title=METRICS[metric], xlabel="percentile", ylabel="ms", ylim=(0, None))
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _samples_ms(done: Sequence[Record]) -> dict[str, list[float]]:
    return {
        "ttft": [record.ttft_s * 1e3 for record in done],
        "tpot": [record.tpot_s * 1e3 for record in done if record.output_tokens > 1],
        "itl": [gap * 1e3 for record in done for gap in record.gaps_s],
        "e2el": [record.latency_s * 1e3 for record in done],
    }


def _statistics(metric: str, values: Sequence[float]) -> dict[str, float]:
    filled = values or [0.0]
    figures = {
        f"mean_{metric}_ms": float(np.mean(filled)),
        f"median_{metric}_ms": float(np.median(filled)),
        f"std_{metric}_ms": float(np.std(filled)),
    }
    return figures | {f"p{p}_{metric}_ms": float(np.percentile(filled, p)) for p in PERCENTILES}


def _good(record: Record, limits_ms: Mapping[str, float]) -> bool:
    figures = {"ttft": record.ttft_s * 1e3, "tpot": record.tpot_s * 1e3, "e2el": record.latency_s * 1e3}
    return all(figures[metric] <= limit for metric, limit in limits_ms.items())
