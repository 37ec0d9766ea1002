"""Models as torch has them that are split over ranks, and what of each is compared with it whole."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tests.injected import mask_of, prompts
from tests.tiny_encoders import random_encoder
from tests.tiny_models import KINDS, SIZES

GRAIN = 8  # the tiny models' features are few


def whole(kind: str, **fields: Any) -> Any:
    """A random model, the same in every process: of KINDS with other fields of its config, "bert", "t5" or "plain"."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "bert":
            return random_encoder("bert", "BertForMaskedLM").eval()
        if kind == "plain":
            model: Any = Plain(**fields)
        elif kind == "t5":
            sizes = {"d_model": 48, "d_kv": 8, "num_heads": 6, "num_layers": 2, "d_ff": 80, "vocab_size": 384}
            model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes, decoder_start_token_id=0))
        else:
            values = {name: value for name, value in {**SIZES, **KINDS[kind], **fields}.items() if value is not None}
            config = AutoConfig.for_model(str(values.pop("model_type")), **values)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                low, high = (-0.5, 0.5) if name.endswith("bias") else (0.5, 1.5)
                nn.init.uniform_(parameter, low, high)
    return model.eval()


@torch.inference_mode()
def answer(kind: str, model: Any) -> Tensor:
    """To three rows, two of which have padding before them; of a token that has nothing to look at: zeros."""
    ids, mask = prompts(), mask_of("none" if kind == "plain" else "left")
    if kind == "plain":
        return model(ids)
    others = {"decoder_input_ids": ids} if kind == "t5" else {}
    logits = model(ids, attention_mask=mask, **others).logits
    return logits if kind == "t5" else logits * mask[..., None]


def tokens(model: Any, **asked: Any) -> Tensor:
    """What it generates."""
    asked = {"max_new_tokens": 6, "do_sample": False, **asked}
    return model.generate(prompts(), attention_mask=mask_of("left"), **asked)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def bits(tensor: Tensor) -> str:
    """The same for tensors of the same bits."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


class Plain(nn.Module):
    """Of no library: its linears have names of their own, its config is a plain object."""

    def __init__(self, num_heads: int = 4) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=384, num_attention_heads=num_heads)
        self.table = nn.Embedding(384, 32)
        self.blocks = nn.ModuleList(PlainBlock(num_heads) for _ in range(2))
        self.lm_head = nn.Linear(32, 384)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


class PlainBlock(nn.Module):
    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.mix = (nn.Linear(32, 32) for _ in range(4))
        self.norm = nn.LayerNorm(32)
        self.widen, self.narrow = nn.Linear(32, 72), nn.Linear(72, 32)
        self.last_norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.num_heads, -1)
        q, k, v = (part(x).view(shape).transpose(1, 2) for part in (self.q, self.k, self.v))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = self.norm(x + self.mix(attended))
        return self.last_norm(x + self.narrow(functional.gelu(self.widen(x))))
