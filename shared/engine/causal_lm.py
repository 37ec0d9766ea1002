"""A Hugging Face causal language model whose forward is the engine's decoder: kernel injection.

The model keeps its class, configuration and `generate`; its layers are gone, and in their place is the decoder that the
workers run, over the paged pool.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.engine.engine import Engine
from shared.engine.plan import EnginePlan
from shared.engine.ranks import least
from shared.engine.session import Pool, Session
from shared.kv_cache import KvLayout
from shared.models.architecture import Architecture
from shared.models.quantization import QuantizationPlan
from shared.models.weights import ModelWeights
from shared.parallel.expert_groups import ExpertGroups
from shared.parallel.group import Group
from shared.parallel.sharding import Shard

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
        group: Group | None = None,
        shard: Shard | None = None,
        expert_groups: ExpertGroups | None = None,
    ) -> None:
        """model: a PreTrainedModel whose class and configuration `module` has; its weights are not looked at.

        group: the ranks that compute it, all of which make the same calls; shard: what of it the weights are.
        expert_groups: likewise of its experts, of which the weights are this rank's.
        """
        from shared.engine.hugging_face import shell_of

        dtype = weights.embedding.dtype
        max_context = min(limits.max_out_tokens, architecture.max_context)
        layout = KvLayout.of(architecture, "", str(dtype).removeprefix("torch."), _BLOCK_TOKENS, shard=shard)
        plan = EnginePlan(
            files=None,
            architecture=architecture,
            dtype=layout.dtype,
            layout=layout,
            quantization=QuantizationPlan(),
            device=device,
            num_blocks=_num_blocks(
                layout, max_context, limits.min_out_tokens, device, group or (expert_groups and expert_groups.world)
            ),
            max_context=max_context,
            batch_tokens=max_context,
            max_running=_MAX_RUNNING,
            num_threads=torch.get_num_threads() or len(os.sched_getaffinity(0)),
            deterministic=True,
            enable_cuda_graph=enable_cuda_graph,
            eos_token_ids=(),
            allow_pickle=False,
            shard=shard,
            expert_shard=expert_groups and expert_groups.shard,
        )
        self.engine = Engine(plan, weights=weights, group=group, expert_groups=expert_groups)
        self._pool = Pool(self.engine)
        self._max_tokens = max_context
        self._kind, self._vocab_size = type(model), architecture.vocab_size
        self.module = shell_of(
            model,
            torch.device(device),
            dtype,
            forward=self.forward,
            generate=self.generate,
            state_dict=_no_parameters("state_dict"),
            load_state_dict=_no_parameters("load_state_dict"),
            _apply=self._apply,
        )

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
        if input_ids is None or input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError("input_ids: wants token ids [rows, columns]; embeddings are not taken in their place")
        config = self.module.config
        is_fresh = past_key_values is None
        if is_fresh:
            past_key_values = KvSessionCache(self.session(input_ids.shape[0]))
            weakref.finalize(past_key_values, past_key_values.session.close).atexit = False
        elif not isinstance(past_key_values, KvSessionCache):
            raise ValueError(
                f"past_key_values: wants what an earlier call returned, has a {type(past_key_values).__name__}"
            )
        session = past_key_values.session
        keeps_one = isinstance(logits_to_keep, int) and logits_to_keep == 1 and labels is None
        try:
            if position_ids is not None:
                session.check_positions(position_ids, input_ids, attention_mask)
            logits = session.feed(input_ids, attention_mask, "last" if keeps_one else "all")
        except BaseException:
            if is_fresh:
                session.close()
            raise
        if not isinstance(logits_to_keep, int):
            logits = logits[:, logits_to_keep]
        elif logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            loss = self.module.loss_function(logits=logits, labels=labels, vocab_size=self._vocab_size)
        keeps_cache = getattr(config, "use_cache", True) if use_cache is None else use_cache
        answer = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=past_key_values if keeps_cache else None
        )
        wants_dict = getattr(config, "return_dict", True) if return_dict is None else return_dict
        return answer if wants_dict else answer.to_tuple()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own loop, over a cache that this call begins with and ends with.

        Only a cache that the caller gives outlives it. Raises NotImplementedError for ways of decoding that the fused
        layers do not have.
        """
        from shared.engine.hugging_face import Asked, KvSessionCache

        arguments = by_name(args, kwargs)
        asked = Asked.of(self.module, arguments).config
        _refuse_ways(asked)
        plain_generate = self._kind.generate
        if asked.use_cache is False or kwargs.get("past_key_values") is not None:
            return plain_generate(self.module, *args, **kwargs)
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds: not taken by a model with kernel injection; give input_ids")
        if arguments.get("cache_implementation") or getattr(
            arguments.get("generation_config"), "cache_implementation", None
        ):
            raise ValueError("cache_implementation: the engine's cache is its own; leave it out")
        if asked.cache_implementation:  # the model's own wish, which is of no use here
            kwargs["cache_implementation"] = None
        prompt = prompt_of(arguments)
        if prompt is not None and prompt.dim() != 2:
            raise ValueError(f"input_ids: {list(prompt.shape)}, wants the prompts' token ids [rows, columns]")
        rows = 1 if prompt is None else prompt.shape[0]
        session = self.session(rows * (asked.num_return_sequences or 1))
        try:
            return plain_generate(self.module, *args, **{**kwargs, "past_key_values": KvSessionCache(session)})
        finally:
            session.close()

    @property
    def max_tokens(self) -> int:
        """Of prompt and output together, at most."""
        return self._max_tokens

    @property
    def max_context(self) -> int:
        """Tokens that the model has positions for."""
        return self.engine.plan.architecture.max_context

    def session(self, num_rows: int) -> Session:
        """An empty cache for so many rows."""
        return Session(self._pool, num_rows, self._max_tokens)

    def close(self) -> None:
        """Lets go of weights and pool."""
        self.engine.close()

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`to`, `half`, `cuda` and the like. Raises RuntimeError for another device or dtype than the engine's."""
        own = torch.empty(0, dtype=self.module.dtype, device=self.module.device)
        asked = function(own)
        if (asked.dtype, asked.device.type) != (own.dtype, own.device.type):
            raise RuntimeError(
                f"the injected layers compute in {own.dtype} on {own.device}, and cannot be made {asked.dtype} on "
                f"{asked.device}; give init_inference the dtype"
            )
        return self.module


def by_name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of transformers' `generate`, as far as they are looked at."""
    return {**dict(zip(("inputs", "generation_config"), args, strict=False)), **kwargs}


def prompt_of(arguments: dict[str, Any]) -> Tensor | None:
    given = arguments.get("input_ids")
    return arguments.get("inputs") if given is None else given


# what a way of decoding that the fused layers do not have is asked for by, and what it needs
_WAYS = {
    "penalty_alpha": "contrastive search reads hidden states",
    "dola_layers": "DoLa reads the logits of early layers",
    "assistant_early_exit": "the draft would be read from early layers",
    "use_mtp": "the draft's layers are not injected",
    "constraints": "constraints need beams",
    "force_words_ids": "forced words need beams",
}


def _refuse_ways(asked: Any) -> None:
    for name, why in _WAYS.items():
        if getattr(asked, name, None):
            raise NotImplementedError(f"{name}: {why}, and kernel injection keeps none; leave it out")


def _refuse(kwargs: dict[str, Any]) -> None:
    """Raises ValueError for an argument that asks for something; None and False ask for nothing."""
    for name, value in kwargs.items():
        if value is None or value is False or name == "tokenizer":  # generate's, for stop strings, gets here too
            continue
        if name in ("output_hidden_states", "output_attentions"):
            raise ValueError(f"{name}: the fused layers keep none; run the model without kernel injection for them")
        raise ValueError(f"{name}: not taken by a model with kernel injection")


def _no_parameters(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError(
            f"{name}: the injected layers have their weights fused, and the model's own are gone; save or load the "
            "model before init_inference"
        )

    return refuse


def _num_blocks(layout: KvLayout, max_context: int, min_tokens: int, device: str, group: Group | None) -> int:
    """Of the first pool, as many on all ranks. Raises RuntimeError where there is no memory for the least asked for."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    affordable = least(group, free // 2 // layout.block_bytes)
    needed = -(-min_tokens // layout.block_tokens) + 1
    if affordable < needed:
        raise RuntimeError(
            f"Workspace can't be allocated, not enough memory: {min_tokens} tokens (min_out_tokens) take "
            f"{needed * layout.block_bytes} bytes of keys and values, and {free} are free"
        )
    wanted = _ROWS_AT_FIRST * -(-max_context // layout.block_tokens) + 1
    return max(min(wanted, affordable), needed, 2)
