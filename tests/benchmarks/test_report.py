"""Figures computed from records made by hand, and workloads that repeat themselves."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from benchmarks.driver import Record
from benchmarks.report import draw, summarise, table, write_json
from benchmarks.workload import WORKLOADS, Shape, poisson_arrivals


def record(ttft_s: float, gaps_s: list[float], **fields: object) -> Record:
    return Record(
        prompt_tokens=10,
        output_tokens=1 + len(gaps_s),
        ttft_s=ttft_s,
        gaps_s=gaps_s,
        latency_s=ttft_s + sum(gaps_s),
        **fields,
    )


def test_figures() -> None:
    records = [
        record(0.1, [0.02, 0.04]),
        record(0.3, [0.01, 0.01, 0.01]),
        record(9.0, [9.0], cancelled=True),
        record(9.0, [9.0], error="UNAVAILABLE: gone"),
    ]
    result = summarise(records, 2.0, goodput={"ttft": 200, "tpot": 50})
    assert (result["completed"], result["failed"], result["cancelled"]) == (2, 1, 1)
    assert result["total_output_tokens"] == 7
    assert result["output_throughput"] == pytest.approx(3.5)
    assert result["total_token_throughput"] == pytest.approx(13.5)
    assert result["mean_ttft_ms"] == pytest.approx(200)
    assert result["median_tpot_ms"] == pytest.approx(20)  # of 30 and 10
    assert result["p99_itl_ms"] == pytest.approx(39.2)
    assert result["request_goodput"] == pytest.approx(0.5)
    assert "inter-token latency" in table(result)


def test_files(tmp_path: Path) -> None:
    records = [record(0.1, [0.02, 0.04]), record(0.3, [])]
    write_json(summarise(records, 1.0, detailed=True), tmp_path / "deep" / "result.json")
    assert json.loads((tmp_path / "deep" / "result.json").read_text())["output_lens"] == [3, 1]
    draw(records, tmp_path / "figure.png", "two requests")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_repeat_and_keep_to_their_shape(name: str) -> None:
    shape = Shape(num_requests=50, input_tokens=40, output_tokens=20, scale=0.1, seed=3)
    requests = WORKLOADS[name](shape)
    assert requests == WORKLOADS[name](shape)
    assert requests != WORKLOADS[name](Shape(num_requests=50, input_tokens=40, output_tokens=20, scale=0.1, seed=4))
    assert len(requests) == 50
    assert all(r.output_tokens >= 1 and (r.token_ids or r.text) for r in requests)


def test_poisson_arrivals_keep_the_rate() -> None:
    requests = poisson_arrivals(WORKLOADS["random"](Shape(2000)), 10.0, seed=1)
    assert requests[-1].arrival_s == pytest.approx(200, rel=0.1)
    assert all(a.arrival_s <= b.arrival_s for a, b in itertools.pairwise(requests))
