"""A policy for a model that has none: found by its parameters' names and shapes, and held against its own answers.

Nothing is injected that was not seen to answer as the model does: random tokens go through both, and a policy whose
logits differ is refused. Sequences are proven up to a length; where the config names a window or a chunk that a longer
one would reach, it is not taken any further than that.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kernels.dtypes import DTYPES
from shared.batch import BatchEntry, build_batch
from shared.checkpoint import CheckpointError
from shared.checkpoint.state_dict import StateDictCheckpoint
from shared.engine.own_answers import BOUNDS, spread
from shared.kv_cache import KvCache, KvLayout
from shared.model_files import ModelError
from shared.models.architecture import Architecture
from shared.models.decoder import Decoder
from shared.models.loading import load_weights
from shared.policies.detect import candidates
from shared.policies.policy import Policy, UnsupportedModelError

_SHORT, _LONG = 24, 512  # tokens of the row that chooses, and of the one that proves at most
_BLOCK_TOKENS = 16


def detected(module: nn.Module, fields: Mapping[str, object], max_tokens: int) -> Policy:
    """The policy of a model in memory, by which it gives the same logits, up to `max_tokens` in a sequence.

    On a CPU both are compared in float32, elsewhere in the model's dtype. Raises UnsupportedModelError saying what is
    not understood, or how far the nearest policy's answers are from the model's.
    """
    family = str(fields.get("model_type") or type(module).__name__)
    if fields.get("is_encoder_decoder"):
        raise UnsupportedModelError("is_encoder_decoder", "decoders of an encoder are not supported")
    asked = _Asked(_comparable(module), family)
    nearest: tuple[float, Policy] | None = None
    refused: ModelError | None = None
    for policy in candidates(asked.parameters, fields, asked.buffers):
        try:
            architecture = policy.architecture(fields)
            decoder = asked.decoder(architecture, policy)
        except (UnsupportedModelError, CheckpointError) as error:
            refused = refused or error
            continue
        apart = asked.apart(decoder, min(_SHORT, architecture.max_context))
        if apart <= asked.bound:
            policy = _within(policy, fields, architecture.max_context, max_tokens)
            apart = asked.apart(decoder, min(_LONG, policy.architecture(fields).max_context, max_tokens))
        decoder.close()
        if apart <= asked.bound:
            return policy
        if nearest is None or apart < nearest[0]:
            nearest = apart, policy
    if nearest is None:
        raise refused or UnsupportedModelError("model_type", f"{family!r} has no policy, and none is found")
    raise UnsupportedModelError(
        "model_type",
        f"{family!r} has no policy, and the nearest that is found answers otherwise: its logits are {nearest[0]:.2g} "
        f"of their spread off ({_summary(nearest[1])}); give one by injection_policy (docs/models.md)",
    )


class _Asked:
    """A model whose own answers count. Of each length one row of random tokens is asked for, once."""

    def __init__(self, model: nn.Module, family: str) -> None:
        self._model, self._family = model, family
        self._device, dtype = _place(model)
        self.bound = BOUNDS.get(dtype, BOUNDS[torch.float32])
        self._dtype = dtype if dtype in DTYPES.values() else torch.float32
        self.parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        state = model.state_dict()
        self.buffers = sorted(state.keys() - self.parameters.keys())
        self._checkpoint = StateDictCheckpoint({name: value.cpu() for name, value in state.items()}, "the model")
        self._answers: dict[int, tuple[Tensor, Tensor]] = {}

    def decoder(self, architecture: Architecture, policy: Policy) -> Decoder:
        weights = load_weights(architecture, self._checkpoint, dtype=self._dtype, device=self._device, policy=policy)
        return Decoder(architecture, weights)

    def apart(self, decoder: Decoder, length: int) -> float:
        """How far the worst token's logits of a row are from the model's, as part of how much these vary."""
        vocab_size = decoder.architecture.vocab_size
        if length not in self._answers:
            generator = torch.Generator().manual_seed(length)
            row = torch.randint(0, vocab_size, (length,), generator=generator)
            self._answers[length] = row, self._answer(row, vocab_size)
        row, theirs = self._answers[length]
        apart = (self._computed(decoder, row) - theirs).norm(dim=1) / spread(theirs)
        return float(apart.nan_to_num(float("inf")).max())

    @torch.inference_mode()
    def _answer(self, row: Tensor, vocab_size: int) -> Tensor:
        """The model's own logits, float32 [tokens, vocab]."""
        try:
            answer: Any = self._model(row[None].to(self._device))
        except Exception as error:  # whatever its code raises
            raise UnsupportedModelError(
                "model_type", f"{self._family!r} has no policy, and its own forward takes no rows of tokens: {error}"
            ) from error
        logits = answer if isinstance(answer, Tensor) else getattr(answer, "logits", None)
        if logits is None and isinstance(answer, tuple):
            logits = answer[0]
        if not isinstance(logits, Tensor) or logits.shape != (1, len(row), vocab_size):
            raise UnsupportedModelError(
                "architectures", f"{type(self._model).__name__} answers no logits [rows, tokens, {vocab_size}]"
            )
        if not bool((spread(logits[0]) > 0).all()):
            raise UnsupportedModelError(
                "model_type",
                f"{self._family!r} has no policy, and its logits do not vary, so that nothing would be proven; give "
                "one by injection_policy",
            )
        return logits[0].float().cpu()

    def _computed(self, decoder: Decoder, row: Tensor) -> Tensor:
        """The decoder's."""
        num_blocks = -(-len(row) // _BLOCK_TOKENS)
        layout = KvLayout.of(decoder.architecture, "", str(decoder.dtype).removeprefix("torch."), _BLOCK_TOKENS)
        kv = KvCache(layout, num_blocks + 1, device=self._device.type)
        batch = build_batch([BatchEntry(row.tolist(), 0, range(1, num_blocks + 1), "all")], _BLOCK_TOKENS)
        try:
            return decoder.forward(batch.to(self._device.type), kv).float().cpu()
        finally:
            kv.close()


def _comparable(module: nn.Module) -> nn.Module:
    """The model, or on a CPU a copy in float32."""
    device, dtype = _place(module)
    if device.type == "cpu" and dtype != torch.float32:
        module = copy.deepcopy(module).float()
    return module.eval()


def _place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(module.parameters())
    return parameter.device, parameter.dtype


def _within(policy: Policy, fields: Mapping[str, object], max_context: int, max_tokens: int) -> Policy:
    """Not beyond the first window or chunk that the config names and that no row of the proof reaches over."""
    reach = min(_LONG, max_context, max_tokens)
    bounds = [
        value
        for name, value in fields.items()
        if ("window" in name or "chunk" in name) and isinstance(value, int) and not isinstance(value, bool)
    ]
    beyond = [bound for bound in bounds if bound >= reach and bound < max_context]
    return replace(policy, record={**policy.record, "max_context": min(beyond)}) if beyond else policy


def _summary(policy: Policy) -> str:
    parts = ("norm", "norm_order", "parallel", "gated", "num_kv_heads", "activation")
    said = [f"{name} {policy.record[name]}" for name in parts if name in policy.record]
    return ", ".join([*said, f"rotary {policy.rotary}"])
