"""What a model answers by itself, so that what is made of it can be held against that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shared.parallel.group import GroupError
from shared.policies.policy import UnsupportedModelError

_NUM_ROWS, _NUM_TOKENS = 2, 24
# How far the worst token's answer may lie off another, as part of how much it varies: the rounding of a deep model
BOUNDS = {torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 2e-2}


class OwnAnswers:
    """Of a model in float32 to random rows of tokens, alike in every process that asks.

    In 16 bits a deep model's answers to the same rows differ by a quarter of their spread with the order of sums.
    """

    def __init__(self, model: nn.Module, fields: Mapping[str, object]) -> None:
        """fields: of its config. Raises UnsupportedModelError for a model that takes no rows of tokens."""
        vocab_size = fields.get("vocab_size")
        if not isinstance(vocab_size, int) or vocab_size < 1:
            raise UnsupportedModelError("vocab_size", "not in the model's config, so that it cannot be asked")
        generator = torch.Generator().manual_seed(vocab_size)
        self._rows = torch.randint(0, vocab_size, (_NUM_ROWS, _NUM_TOKENS), generator=generator)
        self._is_encoder_decoder = bool(fields.get("is_encoder_decoder"))
        self._answer = self._ask(model, "its forward takes no rows of tokens")

    def check(self, model: nn.Module) -> None:
        """Raises UnsupportedModelError, saying how far it is off, for one that answers otherwise."""
        answer = self._ask(model, "split, it cannot compute")
        apart = (answer - self._answer).norm(dim=-1) / spread(self._answer)
        worst = float(apart.nan_to_num(float("inf")).max())
        if worst > BOUNDS[torch.float32]:
            raise UnsupportedModelError(
                "architectures",
                f"{type(model).__name__}, split, answers otherwise than whole: {worst:.2g} of its answers' spread off; "
                "set kernel_inject, or name its linears by an injection_policy",
            )

    @torch.inference_mode()
    def _ask(self, model: nn.Module, failing: str) -> Tensor:
        """float32 [rows, tokens, features]. failing: what it means if its code raises."""
        device = next(parameter.device for parameter in model.parameters())
        rows = self._rows.to(device)
        others = {"decoder_input_ids": rows} if self._is_encoder_decoder else {}
        try:
            answer: Any = model(rows, **others)
        except GroupError:
            raise
        except Exception as error:  # whatever its code raises
            raise UnsupportedModelError("architectures", f"{type(model).__name__}: {failing}: {error}") from error
        for name in ("logits", "last_hidden_state"):
            answer = getattr(answer, name, answer)
        if isinstance(answer, tuple):
            answer = answer[0]
        if not isinstance(answer, Tensor) or not answer.is_floating_point():
            raise UnsupportedModelError("architectures", f"{type(model).__name__} answers no tensor of numbers")
        return answer.float().cpu()


def spread(answer: Tensor) -> Tensor:
    """Of the last dimension around its mean."""
    return (answer.float() - answer.float().mean(-1, keepdim=True)).norm(dim=-1)
