"""A module as graphs of its own: the module's results, and nobody's tensors kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import AutoModelForCausalLM

from shared.module_graph import ModuleGraph


class Twofold(nn.Module):
    """Results in a structure, and an argument that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.num_calls = 0

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        self.num_calls += 1
        return {"y": self.linear(x) * scale, "x": x + 1}


class CpuCapturer:
    """Captures a module on the CPU: a replay calls it on the tensors of the capture, and writes into its results."""

    device_type = "cpu"

    def __init__(self) -> None:
        self.num_warm_ups: list[int] = []  # of each capture
        self.num_replays = 0

    def capture(self, compute: Callable[[], Any], warm_ups: int) -> tuple[Any, Callable[[], None]]:
        for _ in range(warm_ups):
            compute()
        self.num_warm_ups.append(warm_ups)
        output = compute()

        def replay() -> None:
            self.num_replays += 1
            for own, fresh in zip(pytree.tree_leaves(output), pytree.tree_leaves(compute()), strict=True):
                if isinstance(own, Tensor):
                    own.copy_(fresh)

        return output, replay


@pytest.fixture
def capturer() -> CpuCapturer:
    return CpuCapturer()


def test_without_a_tensor_on_the_device_the_module_is_called_as_it_is() -> None:
    module = Twofold()
    graph = ModuleGraph(module)
    x = torch.randn(3, 8)
    result = graph(x, scale=2.0)
    assert torch.equal(result["y"], module.linear(x) * 2)
    assert not result["y"].requires_grad
    graph(x)
    assert module.num_calls == 2
    assert graph.num_graphs == 0
    assert set(graph.state_dict()) == {"module.linear.weight", "module.linear.bias"}


def test_a_signature_is_captured_once_after_three_warm_ups(capturer: CpuCapturer) -> None:
    module = Twofold()
    graph = ModuleGraph(module, capturer)
    for _ in range(3):
        x = torch.randn(3, 8)
        assert torch.equal(graph(x)["y"], module.linear(x))
    assert capturer.num_warm_ups == [3]
    assert capturer.num_replays == 3
    assert module.num_calls == 3 + 1 + 3  # warm-ups, the capture, and the replays of this capturer


@pytest.mark.parametrize(
    "change",
    [
        lambda x: {"x": x[:2]},
        lambda x: {"x": x.double()},
        lambda x: {"x": x.T.contiguous().T},  # the same shape, another order in memory
        lambda x: {"x": x, "scale": 2.0},
        lambda x: {"x": x, "scale": 1},  # no float
        lambda x: {"x": x, "scale": True},
    ],
)
def test_every_other_signature_has_a_graph_of_its_own(
    capturer: CpuCapturer, change: Callable[[Tensor], dict[str, Any]]
) -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            return x.sum(1) * scale

    graph, x = ModuleGraph(Sums(), capturer), torch.randn(3, 8)
    other = change(x)
    expected = other["x"].sum(1) * other.get("scale", 1.0)
    first = graph(x=x, scale=1.0)
    torch.testing.assert_close(graph(**other), expected)
    assert graph.num_graphs == 2
    assert torch.equal(graph(x=x, scale=1.0), first)
    assert len(capturer.num_warm_ups) == 2


def test_the_callers_tensors_are_neither_kept_nor_written(capturer: CpuCapturer) -> None:
    module = Twofold()
    graph = ModuleGraph(module, capturer)
    first, second = torch.randn(3, 8), torch.randn(3, 8)
    kept = first.clone()
    graph(first)
    graph(second)
    assert torch.equal(first, kept)  # a later call has not copied its arguments into it
    first.zero_()
    assert torch.equal(graph(second)["x"], second + 1)


def test_a_result_is_not_overwritten_by_a_later_call(capturer: CpuCapturer) -> None:
    graph = ModuleGraph(Twofold(), capturer)
    first, second = torch.randn(3, 8), torch.randn(3, 8)
    result = graph(first)
    graph(second)
    assert torch.equal(result["x"], first + 1)


def test_calls_in_and_out_of_inference_mode_share_a_graph(capturer: CpuCapturer) -> None:
    module = Twofold()
    graph, x = ModuleGraph(module, capturer), torch.randn(3, 8)
    with torch.inference_mode():
        first = graph(x + 0)
    second = graph(x)
    assert torch.equal(second["y"], first["y"])
    assert not second["y"].is_inference()
    module.linear(second["y"]).sum().backward()  # the rest of a model may have gradients
    assert len(capturer.num_warm_ups) == 1


def test_the_graphs_used_last_are_kept(capturer: CpuCapturer) -> None:
    graph = ModuleGraph(Twofold(), capturer)
    for rows in (*range(1, 9), 1, 9):  # 2 is now the one that was not used for longest
        graph(torch.randn(rows, 8))
    assert graph.num_graphs == 8
    assert len(capturer.num_warm_ups) == 9
    graph(torch.randn(1, 8))
    assert len(capturer.num_warm_ups) == 9
    graph(torch.randn(2, 8))
    assert len(capturer.num_warm_ups) == 10


def test_an_object_whose_contents_may_change_is_refused(capturer: CpuCapturer, tiny_model: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    graph, ids = ModuleGraph(model, capturer), torch.randint(5, 300, (1, 6))
    before = graph(input_ids=ids)
    keys = before.past_key_values.layers[0].keys.clone()
    graph(input_ids=ids + 1)
    assert torch.equal(before.past_key_values.layers[0].keys, keys)
    with torch.inference_mode():
        torch.testing.assert_close(before.logits, model(ids).logits)
    with pytest.raises(ValueError, match="plain values, got a DynamicCache"):
        graph(input_ids=ids[:, :1], past_key_values=before.past_key_values)


def test_tensors_of_two_devices_are_refused(capturer: CpuCapturer) -> None:
    with pytest.raises(ValueError, match="all tensors have to be on CPU beside one that is, got one on meta"):
        ModuleGraph(Sum(), capturer)(torch.randn(2), torch.randn(2, device="meta"))


@pytest.mark.gpu
def test_replays_give_the_modules_results_for_every_shape() -> None:
    module = Twofold().cuda()
    graph = ModuleGraph(module)
    kept = []
    for rows, scale in [(1, 1.0), (5, 1.0), (1, 3.0), (1, 1.0), (5, 1.0)]:
        x = torch.randn(rows, 8, device="cuda")
        result = graph(x, scale=scale)
        with torch.inference_mode():
            expected = module(x, scale=scale)
        torch.testing.assert_close(result, expected)
        kept.append((result["x"], x + 1))
    for result, expected in kept:  # a later replay has not written into an earlier result
        assert torch.equal(result, expected)
    for rows in range(1, 20):
        graph(torch.randn(rows, 8, device="cuda"))
    assert graph.num_graphs == 8
    with pytest.raises(ValueError, match="all tensors have to be on CUDA"):
        ModuleGraph(Sum())(torch.randn(2, device="cuda"), torch.randn(2))


class Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b
