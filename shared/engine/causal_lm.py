"""A Hugging Face causal language model whose forward is the engine's decoder: kernel injection.

The model keeps its class, configuration and `generate`; its layers are gone, and in their place is the decoder that the
workers run, over the paged pool.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.engine.engine import Engine
from shared.engine.plan import EnginePlan
from shared.engine.session import Pool, Session
from shared.kv_cache import KvLayout
from shared.models.architecture import Architecture
from shared.models.weights import ModelWeights

_BLOCK_TOKENS = 16
_ROWS_AT_FIRST = 4  # sequences of full length that the first pool holds; it grows with the batch
_MAX_RUNNING = 64  # rows of a captured step at most


@dataclass(frozen=True)
class Limits:
    """Of tokens: of prompt and output together at most, and for which there must be memory at least."""

    max_out_tokens: int
    min_out_tokens: int = 1


class CausalLM:
    """The decoder of a model behind its own interface. `module` is what takes the model's place."""

    def __init__(
        self,
        model: Any,
        architecture: Architecture,
        weights: ModelWeights,
        limits: Limits,
        *,
        device: str,
        enable_cuda_graph: bool,
    ) -> None:
        """model: a PreTrainedModel whose class and configuration `module` has; its weights are not looked at."""
        from shared.engine.hugging_face import shell_of

        dtype = weights.embedding.dtype
        max_context = min(limits.max_out_tokens, architecture.max_context)
        layout = KvLayout.of(architecture, "", str(dtype).removeprefix("torch."), _BLOCK_TOKENS)
        plan = EnginePlan(
            files=None,
            architecture=architecture,
            dtype=layout.dtype,
            layout=layout,
            quantization="none",
            device=device,
            num_blocks=_num_blocks(layout, max_context, limits.min_out_tokens, device),
            max_context=max_context,
            batch_tokens=max_context,
            max_running=_MAX_RUNNING,
            num_threads=torch.get_num_threads() or len(os.sched_getaffinity(0)),
            deterministic=True,
            enable_cuda_graph=enable_cuda_graph,
            eos_token_ids=(),
            allow_pickle=False,
        )
        self.engine = Engine(plan, weights=weights)
        self._pool = Pool(self.engine)
        self._max_tokens = max_context
        self.module = shell_of(model, torch.device(device), dtype, forward=self.forward)
        self._vocab_size = architecture.vocab_size

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own interface and output; float32 logits.

        Padding may stand anywhere: a masked column has the logits of the token before it. Positions count the tokens of
        a row from its first one, as generate has them. Raises ValueError for what the fused layers do not keep.
        """
        from shared.engine.hugging_face import CausalLMOutputWithPast, KvSessionCache

        _refuse(kwargs)
        if input_ids is None or input_ids.dim() != 2:
            raise ValueError("input_ids: wants token ids [rows, columns]; embeddings are not taken in their place")
        if past_key_values is None:
            past_key_values = KvSessionCache(self.session(input_ids.shape[0]))
            weakref.finalize(past_key_values, past_key_values.session.close)
        elif not isinstance(past_key_values, KvSessionCache):
            raise ValueError(
                f"past_key_values: wants what an earlier call returned, has a {type(past_key_values).__name__}"
            )
        session = past_key_values.session
        if position_ids is not None:
            session.check_positions(position_ids, input_ids, attention_mask)
        keeps_one = isinstance(logits_to_keep, int) and logits_to_keep == 1 and labels is None
        logits = session.feed(input_ids, attention_mask, "last" if keeps_one else "all")
        if not isinstance(logits_to_keep, int):
            logits = logits[:, logits_to_keep]
        elif logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            loss = self.module.loss_function(logits=logits, labels=labels, vocab_size=self._vocab_size)
        answer = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=None if use_cache is False else past_key_values
        )
        return answer.to_tuple() if return_dict is False else answer

    def session(self, num_rows: int) -> Session:
        """An empty cache for so many rows."""
        return Session(self._pool, num_rows, self._max_tokens)

    def close(self) -> None:
        """Lets go of weights and pool."""
        self.engine.close()


def _refuse(kwargs: dict[str, Any]) -> None:
    """Raises ValueError for an argument that asks for something; None and False ask for nothing."""
    for name, value in kwargs.items():
        if value is None or value is False:
            continue
        if name in ("output_hidden_states", "output_attentions"):
            raise ValueError(f"{name}: the fused layers keep none; run the model without kernel injection for them")
        raise ValueError(f"{name}: not taken by a model with kernel injection")


def _num_blocks(layout: KvLayout, max_context: int, min_tokens: int, device: str) -> int:
    """Of the first pool. Raises RuntimeError where there is no memory for the least that is asked for."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    affordable = free // 2 // layout.block_bytes
    least = -(-min_tokens // layout.block_tokens) + 1
    if affordable < least:
        raise RuntimeError(
            f"Workspace can't be allocated, not enough memory: {min_tokens} tokens (min_out_tokens) take "
            f"{least * layout.block_bytes} bytes of keys and values, and {free} are free"
        )
    wanted = _ROWS_AT_FIRST * -(-max_context // layout.block_tokens) + 1
    return max(min(wanted, affordable), least, 2)
