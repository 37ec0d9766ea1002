"""A model that Tandem does not know, on the engine's fused layers by a policy of about 30 lines.

    .venv/bin/python examples/custom_policy.py

The model is a plain nn.Module with the parameters of InternLM 2: query, key and value in one projection, for each
key-value head its queries, its key and its value. Its own forward is what the engine's answers are compared with.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shared.engine import init_inference
from shared.policies.names import grouped, rows
from shared.policies.policy import Policy

LAYER = "model.layers.{layer}."

INTERNLM2 = Policy(
    family="internlm2",
    # what config.json may leave out
    defaults={"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    # our parameter -> where it lies, and how it is made of what lies there
    names={
        "embedding": rows("model.tok_embeddings.weight"),
        "final_norm.weight": rows("model.norm.weight"),
        "lm_head.weight": rows("output.weight"),
        "attention_norm.weight": rows(LAYER + "attention_norm.weight"),
        "qkv.weight": grouped(LAYER + "attention.wqkv.weight"),
        "output.weight": rows(LAYER + "attention.wo.weight"),
        "mlp_norm.weight": rows(LAYER + "ffn_norm.weight"),
        "up.weight": rows(LAYER + "feed_forward.w1.weight", LAYER + "feed_forward.w3.weight"),
        "down.weight": rows(LAYER + "feed_forward.w2.weight"),
    },
)


@dataclass
class Config:
    model_type: str = "internlm2"
    vocab_size: int = 512
    hidden_size: int = 128
    intermediate_size: int = 320
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    rope_theta: float = 10_000.0


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.kv_heads, self.head_dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        self.theta, width = config.rope_theta, config.hidden_size
        self.wqkv = nn.Linear(width, width + 2 * self.kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, tokens, hidden]"""
        groups = self.wqkv(x).unflatten(-1, (self.kv_heads, -1, self.head_dim))
        q, k, v = groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]
        q, k, v = self.turned(q).transpose(1, 2), self.turned(k).transpose(1, 2), v.transpose(1, 2)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(attended.transpose(1, 2).flatten(2))

    def turned(self, heads: Tensor) -> Tensor:
        """Rotary embedding of heads [rows, tokens, heads, head_dim]."""
        half = self.head_dim // 2
        frequencies = self.theta ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = (torch.arange(heads.shape[1])[:, None] * frequencies)[:, None]
        first, second = heads.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class FeedForward(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tok_embeddings(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class InternLm2(nn.Module):
    """Token ids [rows, tokens] -> logits [rows, tokens, vocab]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.model = config, Model(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.output(self.model(input_ids))


@torch.inference_mode()
def greedy(model: nn.Module, tokens: Tensor, count: int) -> Tensor:
    """Every step computes all of the sequence."""
    for _ in range(count):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
    return tokens


def random_model() -> InternLm2:
    torch.manual_seed(0)
    model = InternLm2(Config()).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.1)
    return model


def main() -> int:
    model = random_model()
    tokens = torch.randint(0, model.config.vocab_size, (2, 24))
    engine = init_inference(model, kernel_inject=True, injection_policy=INTERNLM2, dtype="float32", max_tokens=128)
    with torch.inference_mode():
        difference = (engine(tokens).logits - model(tokens)).abs().max().item()
    print(f"logits of {tokens.numel()} tokens: the engine's and the model's differ by {difference:.1e} at most")
    generated = engine.generate(tokens, max_new_tokens=40, do_sample=False)
    equal = torch.equal(generated, greedy(model, tokens, 40))
    print(f"greedy tokens of 2 x 40: {'equal' if equal else 'NOT equal'}")
    engine.destroy()
    return 0 if equal and difference < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
