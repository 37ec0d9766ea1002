"""Every expression of Grafana's dashboard asks for what a running gateway tells: metrics, labels and their values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tandem.v1 import inference_pb2, types_pb2

from tests.cluster import Cluster

DASHBOARD = Path(__file__).resolve().parents[2] / "deploy/grafana/dashboards/tandem.json"
FUNCTIONS = {"rate", "sum", "histogram_quantile"}
GROUPING = {"by", "without"}
TOKEN = re.compile(r'\s*("[^"]*"|\$?[A-Za-z_][A-Za-z0-9_]*|[0-9.]+|!=|=~|!~|[=(){}\[\],/*+-])')


@dataclass
class Asked:
    """What expressions ask for."""

    metrics: dict[str, set[str]] = field(default_factory=dict)  # name -> labels that it must have
    values: set[tuple[str, str]] = field(default_factory=set)  # of labels that must be equal to something


def read(expression: str) -> Asked:
    """Raises AssertionError for what it does not know, so that nothing stays unseen."""
    asked = Asked()
    grouped: list[str] = []
    metric = ""
    tokens = list(tokens_of(expression))
    label, equal = "", False
    inside = ""  # of braces, of a list of labels, of a range
    for token, following in zip(tokens, [*tokens[1:], ""], strict=True):
        if token in ("{", "["):
            inside = token
        elif token in ("}", "]") or (token == ")" and inside == "by"):
            inside = ""
        elif inside == "{":
            if following in ("=", "!=", "=~", "!~"):
                asked.metrics[metric].add(token)
                label = token
                equal = following == "="
            elif token.startswith('"') and equal:
                asked.values.add((label, token.strip('"')))
        elif inside == "[":
            assert token == "$__rate_interval", token
        elif token in GROUPING:
            inside = "by"
        elif inside == "by":
            if token not in "(,":
                grouped.append(token)
        elif re.match(r"[A-Za-z_]", token):
            if following == "(" or following in GROUPING:
                assert token in FUNCTIONS, f"{token} is no function that is known here"
            else:
                metric = token
                asked.metrics.setdefault(metric, set())
    for labels in asked.metrics.values():
        labels.update(grouped)
    return asked


def tokens_of(expression: str) -> Iterator[str]:
    position = 0
    while position < len(expression.rstrip()):
        match = TOKEN.match(expression, position)
        assert match, f"{expression[position:]!r} cannot be read"
        yield match[1]
        position = match.end()


def targets() -> list[tuple[str, str, str]]:
    """Title of the panel, expression, legend."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [(panel["title"], t["expr"], t["legendFormat"]) for panel in panels for t in panel.get("targets", ())]


def test_expressions_are_read_as_they_are() -> None:
    asked = read('sum by (a, b) (rate(m_total{c="1",d!="2"}[$__rate_interval])) / n_count')
    assert asked.metrics == {"m_total": {"a", "b", "c", "d"}, "n_count": {"a", "b"}}
    assert asked.values == {("c", "1")}
    for wrong in ("delta(m[$__rate_interval])", "m[5m]", "m @ 3"):
        with pytest.raises(AssertionError):
            read(wrong)


async def test_the_gateway_tells_what_the_dashboard_asks_for(cluster: Cluster) -> None:
    sampling = types_pb2.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    result = await cluster.generate(inference_pb2.GenerateRequest(text="The capital of France", sampling=sampling))
    assert result.receipt.handoff_bytes
    with pytest.raises(grpc.aio.AioRpcError):
        await cluster.generate(inference_pb2.GenerateRequest(text="x", sampling=types_pb2.SamplingParams(top_p=7)))
    async with httpx.AsyncClient(base_url=cluster.http_url, trust_env=False) as client:
        body = {"prompt": "Hello", "max_tokens": 2}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        text = (await client.get("/metrics")).text
    told: dict[str, set[str]] = {}
    values: set[tuple[str, str]] = set()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            told.setdefault(sample.name, set()).update(sample.labels)
            values.update(sample.labels.items())
    wanted = targets()
    assert len(wanted) > 30
    for title, expression, legend in wanted:
        asked = read(expression)
        assert asked.metrics, f"{title}: {expression} asks for nothing"
        for metric, labels in asked.metrics.items():
            assert metric in told, f"{title}: no metric is called {metric}"
            assert labels <= told[metric], f"{title}: {metric} has the labels {told[metric]}, not {labels}"
            if "(" not in expression:  # by itself a metric keeps its labels
                assert set(re.findall(r"{{(\w+)}}", legend)) <= told[metric], title
        assert asked.values <= values, f"{title}: {asked.values - values} never occur"
        kept = re.findall(r"by \(([^)]*)\)", expression)
        if kept:
            assert set(re.findall(r"{{(\w+)}}", legend)) <= {name.strip() for name in kept[0].split(",")}, title


async def test_every_metric_that_matters_has_a_panel() -> None:
    shown = {metric for _, expression, _ in targets() for metric in read(expression).metrics}
    for name in (
        "tandem_time_to_first_token_seconds_bucket",
        "tandem_time_per_output_token_seconds_bucket",
        "tandem_inter_token_seconds_bucket",
        "tandem_completion_tokens_total",
        "tandem_requests_total",
        "tandem_requests_queued",
        "tandem_worker_running",
        "tandem_worker_free_blocks",
        "tandem_handoff_bytes_total",
        "tandem_handoff_seconds_bucket",
    ):
        assert name in shown
