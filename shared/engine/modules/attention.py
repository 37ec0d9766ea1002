"""Self attention over a paged cache: queries and keys are turned, keys and values written, and all of them read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from kernels.attention import paged_attention
from kernels.kv_format import KvPlanes
from kernels.rope import rope_and_cache
from shared.batch import RaggedBatch
from shared.config.modules import RotateHalfConfig, SelfAttentionConfig
from shared.engine.modules.module import Module, check_dtype, same_dtypes
from shared.models.architecture import Rope
from shared.models.rope import cos_sin_of, inverse_frequencies
from shared.policies.positions import alibi_slopes as slopes_of

_MAX_HEAD_SIZE = 512  # kernels/attention.py; 256 on CUDA
_ROTARY = ("rotate_half", "rotate_every_other")


class SelfAttention(Module[SelfAttentionConfig]):
    """Of each token over its sequence's cache, as masking_type and positional_embedding_type say.

    masking_args of "local" are {"window": tokens}: how many a query sees, itself included. "none": a query sees all of
    its sequence, the tokens behind it too. "symmetric" and "asymmetric" masks are tensors, which no op here reads.
    """

    name = "dense_blocked_attention"
    config_class = SelfAttentionConfig

    def __init__(
        self,
        config: SelfAttentionConfig,
        *,
        alibi_slopes: Sequence[float] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """alibi_slopes: one for each head; default: the geometric series of n_heads_q heads. ValueError for others."""
        super().__init__(config, device=device)
        is_alibi = config.positional_embedding_type == "alibi"
        if alibi_slopes is not None and (not is_alibi or len(alibi_slopes) != config.n_heads_q):
            raise ValueError(
                f"alibi_slopes: {len(alibi_slopes)} are given, and the config has {config.positional_embedding_type} "
                f"positions of {config.n_heads_q} heads"
            )
        slopes = alibi_slopes or slopes_of(config.n_heads_q)
        self._slopes = torch.tensor(slopes, dtype=torch.float32, device=self.device) if is_alibi else None
        self._rotary = config.positional_embedding_config or RotateHalfConfig()
        self._own = self._frequencies()
        self._tables = WeakIdKeyDictionary()  # frequencies -> their cosines and sines
        for name in ("q", "output"):
            self._take(name, config.max_tokens, config.n_heads_q * config.head_size, config.output_dtype)

    @classmethod
    def objection(cls, config: SelfAttentionConfig) -> str | None:
        positions, rotary = config.positional_embedding_type, config.positional_embedding_config
        if config.n_heads_q % config.n_heads_kv:
            return f"n_heads_kv: {config.n_heads_kv} does not divide {config.n_heads_q} heads of queries"
        if config.head_size % 8 or config.head_size > _MAX_HEAD_SIZE:
            return f"head_size: {config.head_size} is not a multiple of 8 up to {_MAX_HEAD_SIZE}"
        if config.masking_type in ("symmetric", "asymmetric"):
            return f"masking_type: {config.masking_type} is a tensor that no op reads; use causal, local or none"
        window = config.masking_args.get("window")
        wanted = {"window"} if config.masking_type == "local" else set[str]()
        if set(config.masking_args) != wanted or (wanted and not (isinstance(window, int) and window >= 1)):
            wants = "{'window': 1 or more tokens}" if wanted else "nothing"
            return f"masking_args: {config.masking_args}, and masking_type {config.masking_type} wants {wants}"
        if positions == "alibi" and config.masking_type == "none":
            return "positional_embedding_type: alibi asks for a position, which a query has only under a causal mask"
        if rotary is not None and positions not in _ROTARY:
            return f"positional_embedding_config: is given, and the type is {positions}; leave it out"
        if rotary and rotary.rotate_dim and (rotary.rotate_dim % 2 or rotary.rotate_dim > config.head_size):
            return f"positional_embedding_config.rotate_dim: {rotary.rotate_dim} is odd or above {config.head_size}"
        return same_dtypes(config, "input_dtype", "output_dtype")

    def __call__(
        self, q_k_v: Tensor, kv_cache: KvPlanes, batch: RaggedBatch, inv_freqs: Tensor | None = None
    ) -> Tensor:
        """q_k_v [tokens, (n_heads_q + 2 * n_heads_kv) * head_size] -> [tokens, n_heads_q * head_size].

        kv_cache: a layer of a KvCache; the tokens' keys and values are written there. inv_freqs: radians per position
        of each rotated pair, [rotate_dim / 2], of a config that uses trained ones; their table is made once.
        Raises ValueError for more sequences than max_sequences, and what the ops raise.
        """
        config, rows = self.config, len(q_k_v)
        check_dtype("q_k_v", q_k_v, "input_dtype", config.input_dtype)
        if batch.num_sequences > config.max_sequences:
            raise ValueError(
                f"max_sequences: {batch.num_sequences} sequences, and the module was made for {config.max_sequences}"
            )
        width = config.n_heads_q * config.head_size
        q = rope_and_cache(
            q_k_v,
            self._cos_sin(inv_freqs, batch.block_tables.shape[1] * kv_cache.keys.shape[2]),
            batch.positions,
            batch.slots,
            kv_cache,
            config.n_heads_q,
            config.n_heads_kv,
            interleaved=config.positional_embedding_type == "rotate_every_other",
            out=self._take("q", rows, width, config.output_dtype).view(rows, config.n_heads_q, config.head_size),
        )
        return paged_attention(
            q,
            kv_cache,
            batch.cu_seqlens,
            batch.context_lens,
            batch.block_tables,
            config.scale_factor,
            config.masking_args.get("window"),
            causal=config.masking_type != "none",
            alibi_slopes=self._slopes,
            max_query_len=batch.max_query_len,
            out=self._take("output", rows, width, config.output_dtype),
        )

    def _frequencies(self) -> Tensor | None:
        """float32; none of them where nothing turns, None where the weights bring them."""
        if self.config.positional_embedding_type not in _ROTARY:
            return torch.empty(0)
        if self._rotary.use_trained_freqs:
            return None
        return inverse_frequencies(Rope(self._rotary.theta_base, self._rotary.rotate_dim or self.config.head_size))

    def _cos_sin(self, given: Tensor | None, positions: int) -> Tensor:
        """The table of cosines and sines, made anew when a batch's block tables have become longer than it."""
        if (given is None) == (self._own is None):
            raise ValueError(f"inv_freqs: {'are missing' if given is None else 'are given'}, against use_trained_freqs")
        frequencies = given if given is not None else self._own
        assert frequencies is not None
        table = self._tables.get(frequencies)
        if table is None or len(table) < positions:
            self._check_pairs(frequencies)
            # a power of two, so that a sequence that grows makes few of them
            table = cos_sin_of(frequencies.float().cpu(), 1 << (positions - 1).bit_length()).to(self.device)
            self._tables[frequencies] = table
        return table

    def _check_pairs(self, frequencies: Tensor) -> None:
        rotated, head_size = self._rotary.rotate_dim, self.config.head_size
        fits = frequencies.dim() == 1 and 2 * len(frequencies) <= head_size
        if not fits or (rotated and len(frequencies) not in (0, rotated // 2)):
            raise ValueError(
                f"inv_freqs: must be one for each of {(rotated or head_size) // 2} pairs, got {list(frequencies.shape)}"
            )
