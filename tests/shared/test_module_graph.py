"""A module as graphs of its own: the module's results, and nobody's tensors kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

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


def test_on_a_cpu_the_module_is_called_as_it_is() -> None:
    module = Twofold()
    graph = ModuleGraph(module)
    x = torch.randn(3, 8)
    result = graph(x, scale=2.0)
    assert torch.equal(result["y"], module.linear(x) * 2)
    assert not result["y"].requires_grad
    graph(x)
    assert module.num_calls == 2
    assert set(graph.state_dict()) == {"module.linear.weight", "module.linear.bias"}


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
    assert len(graph._graphs) == 8
    with pytest.raises(ValueError, match="all tensors have to be on CUDA"):
        ModuleGraph(lambda_module())(torch.randn(2, device="cuda"), torch.randn(2))


def lambda_module() -> nn.Module:
    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    return Sum()
