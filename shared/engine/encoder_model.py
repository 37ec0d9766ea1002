"""A Hugging Face model whose encoders' forwards are the engine's: kernel injection of BERT and its like, and of CLIP.

The model keeps its class, configuration and heads; the encoders in it, or the encoder that it is, compute by
shared/models/encoder.py.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from shared.checkpoint import Checkpoint, CheckpointError
from shared.checkpoint.state_dict import StateDictCheckpoint
from shared.engine.quant_options import QuantOptions, parameter_names
from shared.models.encoder import Encoder
from shared.models.loading import load_weights
from shared.models.ranks import Ranks
from shared.parallel.group import Group
from shared.parallel.partition import Partition
from shared.parallel.sharding import Shard
from shared.policies.bert import BERT, ROBERTA
from shared.policies.clip import CLIP_TEXT, CLIP_VISION
from shared.policies.distilbert import DISTILBERT
from shared.policies.policy import Policy

_CLASSES = {
    "BertModel": BERT,
    "RobertaModel": ROBERTA,
    "DistilBertModel": DISTILBERT,
    "CLIPTextModel": CLIP_TEXT,
    "CLIPVisionModel": CLIP_VISION,
}
_MODEL_TYPES = {policy.family for policy in _CLASSES.values()} | {"clip"}
_KEPT = ("pooler", "post_layernorm")  # of an encoder's own modules: what comes behind its layers


def is_encoder(config: dict[str, object]) -> bool:
    """Whether a parsed config.json is of a model whose encoders can be injected."""
    return config.get("model_type") in _MODEL_TYPES


def encoders_of(model: nn.Module) -> dict[str, Policy]:
    """The encoders in a model by the names of their modules; "" is the model itself."""
    return {name: policy for name, module in model.named_modules() if (policy := _CLASSES.get(_kind(module)))}


class EncoderModel:
    """The encoders of a model behind its own interface. `module` is what takes the model's place."""

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint | None,
        dtype: torch.dtype,
        quantization: QuantOptions,
        device: str,
        group: Group | None = None,
        shard: Shard | None = None,
    ) -> None:
        """model: a PreTrainedModel with encoders_of it, which stays as it is. checkpoint: default, its own weights.
        group: the ranks that compute it, all of which make the same calls; shard: which of its encoders' parts to load.

        Raises ValueError where those are on the meta device and no checkpoint is given, UnsupportedModelError or
        CheckpointError for encoders that cannot be made.
        """
        self._checkpoint, self._dtype, self._device = checkpoint, dtype, device
        self._quantization = quantization
        self._group, self._shard = group, shard
        if checkpoint is None and any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError("checkpoint: the model's weights are on the meta device; say where they are")
        self._tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self._encoders: list[Encoder] = []
        self._policies = encoders_of(model)
        self.module = self._replaced(model, "")
        quantization.check_used()

    def close(self) -> None:
        """Lets go of the weights."""
        for encoder in self._encoders:
            encoder.close()
        self._encoders.clear()

    def _replaced(self, module: Any, name: str) -> Any:
        """The module in the engine's place for it: itself an encoder, or one that holds some, or a copy."""
        if name in self._policies:
            return self._injected(module, name, self._policies[name])
        if not any(encoder.startswith(name and f"{name}.") for encoder in self._policies):
            return self._kept(module, name)
        from shared.engine.hugging_face import shell_of

        shell = shell_of(module, torch.device(self._device), self._dtype)
        for child_name, child in module.named_children():
            setattr(shell, child_name, self._replaced(child, f"{name}.{child_name}" if name else child_name))
        for own, parameter in module.named_parameters(recurse=False):
            setattr(shell, own, nn.Parameter(self._value(own, parameter), requires_grad=False))
        return shell

    def _injected(self, module: Any, name: str, policy: Policy) -> Any:
        from shared.engine.hugging_face import shell_of

        architecture = policy.architecture(module.config.to_dict())
        checkpoint = self._checkpoint or StateDictCheckpoint(
            {key: value.cpu() for key, value in module.state_dict().items()}, name or "the model"
        )
        weights = load_weights(
            architecture,
            checkpoint,
            dtype=self._dtype,
            device=self._device,
            quantization=self._quantization.plan(policy, architecture, parameter_names(module)),
            policy=policy,
            shard=self._shard,
        )
        weights.probe()
        ranks = Ranks(self._group, Partition(architecture, self._shard)) if self._group and self._shard else None
        encoder = Encoder(architecture, weights, ranks=ranks)
        self._encoders.append(encoder)
        kept = {
            child: self._kept(found, f"{name}.{child}" if name else child)
            for child in _KEPT
            if (found := getattr(module, child, None)) is not None
        }
        make = _Images if policy is CLIP_VISION else _Causal if policy is CLIP_TEXT else _Texts
        forward = make(encoder, module.config, kept).forward
        shell = shell_of(module, torch.device(self._device), self._dtype, forward=forward)
        for child in _KEPT:
            if hasattr(shell, child):
                setattr(shell, child, kept.get(child))
        return shell

    def _kept(self, module: nn.Module, name: str) -> nn.Module:
        """A copy in the engine's dtype, where it computes, with the checkpoint's values where there is one."""
        kept = copy.deepcopy(module)
        for path, parameter in list(kept.named_parameters(remove_duplicate=False)):
            owner, _, own = path.rpartition(".")
            value = self._value(f"{name}.{path}", parameter)
            setattr(kept.get_submodule(owner), own, nn.Parameter(value, requires_grad=False))
        return kept.to(self._device).eval()

    def _value(self, name: str, parameter: Tensor) -> Tensor:
        if self._checkpoint is not None:
            names = self._checkpoint.names()
            found = [one for one in (name, self._tied.get(name)) if one in names]
            if found:
                parameter = self._checkpoint.tensor(found[0])
            elif parameter.is_meta:
                raise CheckpointError(f"the checkpoint has no {name}, which the model's head is made of")
        return parameter.detach().to(self._device, self._dtype, copy=True)


class _Forward:
    """What the forwards of encoders have in common."""

    def __init__(self, encoder: Encoder, config: Any, kept: dict[str, nn.Module]) -> None:
        self.encoder, self.config, self.kept = encoder, config, kept

    def hidden(self, input_ids: Tensor | None, mask: Tensor | None, types: Tensor | None) -> Tensor:
        """[rows, columns, hidden]. Padding may stand anywhere, and shapes alone decide what is computed."""
        a = self.encoder.architecture
        ids = _checked_ids(input_ids, a.max_context)
        rows, columns = ids.shape
        positions = self.positions(ids)
        context_lens = None
        order = None
        if mask is not None:
            if mask.shape != ids.shape:
                raise ValueError(f"attention_mask: wants {list(ids.shape)} like input_ids, has {list(mask.shape)}")
            # what is masked goes behind all others of its row, where none of them sees it
            order = (mask.to(ids.device) == 0).int().argsort(dim=1, stable=True)
            ids, positions = ids.gather(1, order), positions.expand_as(ids).gather(1, order)
            types = types if types is None else types.expand_as(ids).gather(1, order)
            if not a.causal:
                context_lens = (mask != 0).sum(1, dtype=torch.int32)
        hidden = self.encoder.forward(
            ids.flatten().contiguous(),
            torch.arange(0, rows * columns + 1, columns, dtype=torch.int32, device=ids.device),
            None if types is None else types.expand_as(ids).flatten().contiguous(),
            positions=positions.expand_as(ids).flatten().int(),
            context_lens=context_lens,
            max_seqlen=columns,
        ).view(rows, columns, a.hidden_size)
        if order is None:
            return hidden
        return torch.empty_like(hidden).scatter_(1, order[..., None].expand_as(hidden), hidden)

    def positions(self, ids: Tensor) -> Tensor:
        """Those of the model's own code [rows or 1, columns], from the first of its table that is a position's."""
        if not self.encoder.architecture.position_offset:
            return torch.arange(ids.shape[1], device=ids.device)[None]
        # RoBERTa counts what is no padding token, and those have the row before the first position
        real = ids != self.config.pad_token_id
        return real.cumsum(1) * real - 1


class _Texts(_Forward):
    """BERT, RoBERTa, DistilBERT."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own interface and output; its pooler's, where it has one."""
        from shared.engine.hugging_face import BaseModelOutput, BaseModelOutputWithPoolingAndCrossAttentions

        _refuse(kwargs)
        hidden = self.hidden(input_ids, attention_mask, token_type_ids)
        _check_positions(position_ids, self.positions(input_ids) if input_ids is not None else None, self)
        if self.encoder.architecture.family == "distilbert":
            answer = BaseModelOutput(last_hidden_state=hidden)
        else:
            pooler = self.kept.get("pooler")
            pooled = None if pooler is None else pooler(hidden)
            answer = BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=pooled)
        return answer.to_tuple() if return_dict is False else answer


class _Causal(_Forward):
    """CLIP's texts, pooled at the token that ends them."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        from shared.engine.hugging_face import BaseModelOutputWithPooling

        _refuse(kwargs)
        hidden = self.hidden(input_ids, attention_mask, None)
        assert input_ids is not None
        _check_positions(position_ids, self.positions(input_ids), self)
        # a config of old names 2, which its tokenizer never gave: there the end is the highest id
        end = self.config.eos_token_id
        last = (input_ids if end == 2 else (input_ids == end)).int().argmax(-1)
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), last]
        answer = BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)
        return answer.to_tuple() if return_dict is False else answer


class _Images(_Forward):
    """CLIP's images, pooled at the class token."""

    def forward(
        self,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool | None = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        from shared.engine.hugging_face import BaseModelOutputWithPooling

        _refuse({"interpolate_pos_encoding": interpolate_pos_encoding, **kwargs})
        patches = self.encoder.architecture.patches
        assert patches
        size = (patches.channels, patches.image_size, patches.image_size)
        if pixel_values is None or tuple(pixel_values.shape[1:]) != size:
            found = None if pixel_values is None else list(pixel_values.shape)
            raise ValueError(f"pixel_values: wants images {[*size]} [images, channels, height, width], has {found}")
        hidden = self.encoder.forward_images(pixel_values)
        answer = BaseModelOutputWithPooling(
            last_hidden_state=hidden, pooler_output=self.kept["post_layernorm"](hidden[:, 0])
        )
        return answer.to_tuple() if return_dict is False else answer


def _checked_ids(input_ids: Tensor | None, max_context: int) -> Tensor:
    if input_ids is None or input_ids.dim() != 2:
        raise ValueError("input_ids: wants token ids [rows, columns]; embeddings are not taken in their place")
    if input_ids.shape[1] > max_context:
        raise ValueError(f"input_ids: {input_ids.shape[1]} columns, and the model has positions for {max_context}")
    return input_ids.long()


def _check_positions(given: Tensor | None, own: Tensor | None, forward: _Forward) -> None:
    if given is None or own is None:
        return
    expected = own + forward.encoder.architecture.position_offset
    if not torch.equal(given.expand(len(given), -1), expected.to(given).expand(len(given), -1)):
        raise ValueError("position_ids: the fused layers keep the model's own; leave them out")


def _refuse(kwargs: dict[str, Any]) -> None:
    """Raises ValueError for an argument that asks for something; None and False ask for nothing."""
    for name, value in kwargs.items():
        if value is None or value is False:
            continue
        if name in ("output_hidden_states", "output_attentions"):
            raise ValueError(f"{name}: the fused layers keep none; run the model without kernel injection for them")
        raise ValueError(f"{name}: not taken by a model with kernel injection")


def _kind(module: nn.Module) -> str:
    return type(module).__name__
