"""The gateway's metrics as Prometheus reads them."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families
from tandem.v1 import types_pb2, worker_pb2

from gateway.metrics import Metrics, transport_name

USAGE = types_pb2.Usage(prompt_tokens=40, cached_tokens=16, completion_tokens=11)
TIMINGS = types_pb2.Timings(
    queue_s=0.01, prefill_s=0.1, handoff_s=0.003, first_token_s=0.11, decode_s=0.5, total_s=0.61
)
RECEIPT = types_pb2.Receipt(
    transport=types_pb2.TRANSPORT_SHARED_MEMORY, handoff_bytes=1 << 20, attempts=2, preemptions=1
)


def samples(metrics: Metrics) -> dict[str, float]:
    """Name, and label values in the order of their names, to value: "tandem_requests_total OK Generate m"."""
    return {
        " ".join([sample.name, *(value for _, value in sorted(sample.labels.items()))]): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def test_a_served_request_shows_in_every_series_it_concerns() -> None:
    metrics = Metrics()
    metrics.set_queued(3)
    metrics.request_started()
    metrics.request_started()
    metrics.token_gap(0.05)
    metrics.request_finished("OK", model="m", usage=USAGE, timings=TIMINGS, receipt=RECEIPT)

    found = samples(metrics)
    assert found["tandem_requests_running"] == 1
    assert found["tandem_requests_queued"] == 3
    assert found["tandem_requests_total OK Generate m"] == 1
    assert found["tandem_prompt_tokens_total"] == 40
    assert found["tandem_cached_tokens_total"] == 16
    assert found["tandem_completion_tokens_total"] == 11
    assert found["tandem_time_to_first_token_seconds_sum"] == 0.11
    assert found["tandem_inter_token_seconds_sum"] == 0.05
    assert found["tandem_time_per_output_token_seconds_sum"] == 0.05  # ten tokens after the first in 0.5 s
    assert found["tandem_request_seconds_sum"] == 0.61
    assert found["tandem_request_phase_seconds_sum prefill"] == 0.1
    assert found["tandem_handoff_bytes_total shared_memory"] == 1 << 20
    assert found["tandem_handoff_seconds_sum shared_memory"] == 0.003
    assert found["tandem_handoff_attempts_total"] == 2
    assert found["tandem_preemptions_total"] == 1


def test_failures_count_but_do_not_enter_the_latencies() -> None:
    metrics = Metrics()
    metrics.request_started()
    metrics.request_finished("UNAVAILABLE", model="m", timings=TIMINGS)
    metrics.request_refused("INVALID_ARGUMENT")

    found = samples(metrics)
    assert found["tandem_requests_running"] == 0
    assert found["tandem_requests_total UNAVAILABLE Generate m"] == 1
    assert found["tandem_requests_total INVALID_ARGUMENT Generate "] == 1
    assert found["tandem_time_to_first_token_seconds_count"] == 0


def test_a_token_of_each_of_n_outputs_counts_as_one_step() -> None:
    metrics = Metrics()
    metrics.request_started()
    usage = types_pb2.Usage(completion_tokens=44)
    metrics.request_finished("OK", model="m", usage=usage, timings=TIMINGS, num_outputs=4)
    assert samples(metrics)["tandem_time_per_output_token_seconds_sum"] == 0.05


def test_nothing_handed_over_is_no_handoff() -> None:
    metrics = Metrics()
    metrics.request_started()
    metrics.request_finished("OK", model="m", usage=USAGE, timings=TIMINGS, receipt=types_pb2.Receipt(attempts=1))
    assert not any(name.startswith("tandem_handoff_seconds") for name in samples(metrics))


def test_a_worker_that_left_leaves_no_series() -> None:
    metrics = Metrics()
    load = worker_pb2.WatchLoadResponse(running=2, free_blocks=90, total_blocks=100, draining=True)
    metrics.set_worker_load("d1", "decode", load)
    metrics.set_worker_load("p1", "prefill", worker_pb2.WatchLoadResponse())
    found = samples(metrics)
    assert found["tandem_worker_up decode d1"] == 1
    assert found["tandem_worker_free_blocks decode d1"] == 90
    assert found["tandem_worker_draining decode d1"] == 1

    metrics.remove_worker("d1", "decode")
    metrics.remove_worker("d1", "decode")
    left = {name.split(" ", 1)[1] for name in samples(metrics) if name.startswith("tandem_worker_")}
    assert left == {"prefill p1"}


def test_every_name_begins_with_tandem_and_two_gateways_do_not_meet() -> None:
    first, second = Metrics(), Metrics()
    first.http_finished("/v1/models", 200)
    first.request_started()
    assert all(name.startswith("tandem_") for name in samples(first))
    assert samples(first)["tandem_http_requests_total /v1/models 200"] == 1
    assert samples(second)["tandem_requests_running"] == 0


def test_transport_names() -> None:
    assert transport_name(types_pb2.TRANSPORT_INLINE) == "inline"
    assert transport_name(types_pb2.TRANSPORT_UNSPECIFIED) == "none"
