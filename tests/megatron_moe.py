"""DeepSpeed-MoE's GPT in plain torch, written from its formulas, with the names of its state dict. float64.

score = softmax(x W^T);  the best k;  of more than one divided by their sum
moe(x) = sum of score * expert(x);  residual: a * moe(x) + b * mlp(x),  a, b = softmax(coefficient(x))
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

SIZES: dict[str, Any] = {
    "model_type": "megatron_gpt_moe",
    "padded_vocab_size": 96,
    "hidden_size": 48,
    "ffn_hidden_size": 72,
    "num_layers": 4,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
}


class Mlp(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.dense_h_to_4h, self.dense_4h_to_h = nn.Linear(hidden, inner), nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(functional.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Gate(nn.Module):
    def __init__(self, hidden: int, experts: int) -> None:
        super().__init__()
        self.wg = nn.Linear(hidden, experts, bias=False)


class Experts(nn.Module):
    def __init__(self, hidden: int, inner: int, count: int) -> None:
        super().__init__()
        self.deepspeed_experts = nn.ModuleList(Mlp(hidden, inner) for _ in range(count))


class MixtureLayer(nn.Module):
    def __init__(self, hidden: int, inner: int, count: int, k: int) -> None:
        super().__init__()
        self.gate, self.experts, self._k = Gate(hidden, count), Experts(hidden, inner, count), k

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.gate.wg(x).softmax(-1).topk(self._k)
        if self._k > 1:
            scores = scores / scores.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for token in range(len(x)):
            for score, expert in zip(scores[token], chosen[token], strict=True):
                out[token] += score * self.experts.deepspeed_experts[int(expert)](x[token])
        return out


class Mixture(nn.Module):
    def __init__(self, hidden: int, inner: int, count: int, k: int, is_residual: bool) -> None:
        super().__init__()
        self.deepspeed_moe = MixtureLayer(hidden, inner, count, k)
        if is_residual:
            self.mlp, self.coefficient = Mlp(hidden, inner), nn.Linear(hidden, 2)
        self._is_residual = is_residual

    def forward(self, x: Tensor) -> Tensor:
        out = self.deepspeed_moe(x)
        if not self._is_residual:
            return out
        of_experts, of_mlp = self.coefficient(x).softmax(-1).split(1, dim=-1)
        return of_experts * out + of_mlp * self.mlp(x)


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.query_key_value, self.dense = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self._heads = heads

    def forward(self, x: Tensor) -> Tensor:
        fused = self.query_key_value(x).unflatten(1, (self._heads, 3, -1))
        q, k, v = (part.transpose(0, 1) for part in fused.unbind(2))
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        values = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
        return self.dense(values.transpose(0, 1).flatten(1))


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any], count: int) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["ffn_hidden_size"]
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.self_attention = Attention(hidden, config["num_attention_heads"])
        is_residual = config.get("mlp_type") == "residual"
        self.mlp = Mixture(hidden, inner, count, config.get("topk", 1), is_residual) if count else Mlp(hidden, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Encoder(nn.Module):
    def __init__(self, config: dict[str, Any], counts: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, count) for count in counts)
        self.final_layernorm = nn.LayerNorm(config["hidden_size"])


class Embedding(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config["padded_vocab_size"], config["hidden_size"])
        self.position_embeddings = nn.Embedding(config["max_position_embeddings"], config["hidden_size"])


class LanguageModel(nn.Module):
    def __init__(self, config: dict[str, Any], counts: list[int]) -> None:
        super().__init__()
        self.embedding, self.encoder = Embedding(config), Encoder(config, counts)


class MegatronMoe(nn.Module):
    """counts: experts of each layer, 0 where it has an MLP. `config` is what config.json says."""

    def __init__(self, counts: list[int], **config: Any) -> None:
        super().__init__()
        self.config = {**SIZES, "num_layers": len(counts), **config}
        with torch.random.fork_rng():
            torch.manual_seed(sum(counts))
            self.language_model = LanguageModel(self.config, counts).double()
            for name, parameter in self.named_parameters():
                # fresh ones would leave the experts alike, and the biases unread
                width = 0.4 if parameter.ndim > 1 else 0.5
                nn.init.uniform_(parameter, -width, width)
                if "layernorm.weight" in name:
                    parameter.data += 1

    @torch.inference_mode()
    def forward(self, input_ids: Tensor) -> Tensor:
        """[rows, tokens] -> float64 logits [rows, tokens, vocab]."""
        return torch.stack([self._row(row) for row in input_ids])

    def _row(self, row: Tensor) -> Tensor:
        embedding = self.language_model.embedding
        x = embedding.word_embeddings(row) + embedding.position_embeddings(torch.arange(len(row)))
        for layer in self.language_model.encoder.layers:
            x = layer(x)
        return self.language_model.encoder.final_layernorm(x) @ embedding.word_embeddings.weight.T

    def greedy(self, row: Tensor, new_tokens: int) -> Tensor:
        for _ in range(new_tokens):
            row = torch.cat([row, self(row[None])[0, -1].argmax()[None]])
        return row
