"""Times of forwards and layers: what is timed, in which unit, and what profiling costs when it is off."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.engine import InferenceEngine, init_inference
from shared.engine import model_profile as profile_file
from tests.injected import KINDS, plain_model, prompts


class Clock:
    """Goes on by a ms whenever it is looked at."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        self.now_s += 0.001
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_file, "time", Clock())


@pytest.fixture(params=["injected", "not injected"])
def engine(request: pytest.FixtureRequest) -> InferenceEngine:
    inject = request.param == "injected"
    return init_inference(plain_model("llama"), kernel_inject=inject, dtype="float32", max_out_tokens=64)


def test_without_profiling_there_are_no_times(engine: InferenceEngine) -> None:
    with pytest.raises(AssertionError, match="model profiling is not enabled"):
        engine.model_times()
    with pytest.raises(AssertionError, match="model profiling is not enabled"):
        engine.layer_times()
    engine.profile_model_time()
    assert engine.model_times() == []
    with pytest.raises(AssertionError, match=r"layer profiling is not enabled: profile_model_time\(layers=True\)"):
        engine.layer_times()


def test_every_forward_has_its_time_in_ms_once(engine: InferenceEngine, clock: None) -> None:
    engine(prompts())
    engine.profile_model_time()
    engine(prompts())
    engine(prompts(1))
    assert engine.model_times() == pytest.approx([1.0, 1.0])
    assert engine.model_times() == []
    engine.generate(prompts(), max_new_tokens=5, min_new_tokens=5)
    assert engine.model_times() == pytest.approx([1.0] * 5)


def test_called_again_it_changes_how_and_counts_nothing_twice(engine: InferenceEngine, clock: None) -> None:
    engine.profile_model_time()
    engine(prompts())
    engine.profile_model_time(use_cuda_events=False)
    engine(prompts())
    assert engine.model_times() == pytest.approx([1.0, 1.0])


def test_layers_are_timed_when_they_are_asked_for(engine: InferenceEngine, clock: None) -> None:
    engine.profile_model_time(layers=True)
    first = engine(prompts())
    engine(prompts()[:, :1], past_key_values=first.past_key_values)  # a step, which else would be a replay
    assert engine.layer_times() == [pytest.approx([1.0] * 3)] * 2
    assert engine.layer_times() == []
    assert engine.model_times() == pytest.approx([5.0, 5.0])  # a mark before the layers, and one behind each
    engine.profile_model_time()
    again = engine(prompts())
    assert engine.model_times() == pytest.approx([1.0])
    assert torch.equal(again.logits, first.logits)
    engine.profile_model_time(layers=True)
    assert engine.layer_times() == []


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_every_kind_are_found_with_and_without_injection(kind: str) -> None:
    for inject in (True, False):
        engine = init_inference(plain_model(kind), kernel_inject=inject, dtype="float32", max_out_tokens=64)
        engine.profile_model_time(layers=True)
        begun_s = time.perf_counter()
        engine.generate(prompts(), max_new_tokens=4, min_new_tokens=4)
        took_ms = (time.perf_counter() - begun_s) * 1000
        layers, whole = engine.layer_times(), engine.model_times()
        assert [len(times) for times in layers] == [3] * 4
        assert all(0 < sum(times) < total for times, total in zip(layers, whole, strict=True))
        assert sum(whole) < took_ms


def test_a_forward_that_fails_has_no_time(engine: InferenceEngine) -> None:
    engine.profile_model_time(layers=True)

    def fails(*_: Any) -> None:
        raise KeyError

    if engine._injection and engine._injection.causal_lm:
        parts: Any = engine._injection.causal_lm.engine._decoder._layers
        whole, parts._mlp = parts._mlp, fails
    else:
        parts = engine.module.model.layers[1].mlp
        whole, parts.forward = parts.forward, fails
    with pytest.raises(KeyError):
        engine(prompts())
    assert (engine.model_times(), engine.layer_times()) == ([], [])
    setattr(parts, "_mlp" if parts.__class__.__name__ == "Transformer" else "forward", whole)
    engine(prompts())
    assert [len(times) for times in engine.layer_times()] == [3]
    assert len(engine.model_times()) == 1


def test_a_module_without_layers_says_so() -> None:
    engine = init_inference(nn.Linear(2, 2), dtype="float32")
    with pytest.raises(ValueError, match="layers: Linear has no ModuleList"):
        engine.profile_model_time(layers=True)


def test_with_graphs_and_nothing_timed_it_says_so() -> None:
    engine = init_inference(plain_model("llama"), kernel_inject=True, dtype="float32", enable_cuda_graph=True)
    engine.profile_model_time()
    with pytest.raises(ValueError, match="Model times are empty and cuda graph is enabled"):
        engine.model_times()
    engine(prompts())
    assert len(engine.model_times()) == 1


def test_the_longest_list_of_modules_are_the_layers() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.few = nn.ModuleList([nn.Linear(4, 4)])
            self.many = nn.ModuleList([nn.Linear(4, 4) for _ in range(5)])

        def forward(self, x: Tensor) -> Any:
            for layer in (*self.few, *self.many):
                x = layer(x)
            return x

    engine = init_inference(Two(), dtype="float32")
    engine.profile_model_time(layers=True)
    engine(torch.randn(2, 4))
    assert [len(times) for times in engine.layer_times()] == [5]


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [True, False])
def test_the_devices_own_clock(graph: bool) -> None:
    for inject in (True, False):
        engine = init_inference(
            plain_model("llama"), kernel_inject=inject, dtype="float32", max_out_tokens=64, enable_cuda_graph=graph
        )
        engine.profile_model_time()
        for _ in range(3):
            engine(prompts().cuda())
        assert len(engine.model_times()) == 3
        engine.profile_model_time(layers=True)
        engine(prompts().cuda())
        assert all(0 < ms < 1000 for ms in engine.layer_times()[0])
