"""What of diffusers the engine has to know: the layers of its models, and what the engine has in their place.

The one file of the engine that imports diffusers; that takes seconds, and nothing but a pipeline needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.activations import GEGLU, GELU, ApproximateGELU, LinearActivation, SwiGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from shared.engine import image_layers as ours
from shared.engine.image_bindings import Binding, attention_binding
from shared.models.quantization import Scheme

__all__ = ["ModelMixin", "Replacer", "check"]

# they compute the same attention, each in its way
_PROCESSORS = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)
_ACTIVATIONS = {nn.SiLU: "silu", nn.GELU: "gelu", nn.ReLU: "relu"}


@dataclass(frozen=True)
class Replacer:
    """Puts the engine's layers into a model. `used` takes down what each computes with.

    Replacing packs the weights, so the model has to be on its device and of its dtype.
    """

    bindings: dict[str, Binding]
    scheme: Scheme | None
    used: list[Binding]

    def replace(self, model: nn.Module) -> None:
        """Call `check` for every model before."""
        for parent in list(model.modules()):
            if type(getattr(parent, "conv_norm_out", None)) is nn.GroupNorm and isinstance(
                getattr(parent, "conv_act", None), nn.SiLU
            ):
                parent.conv_norm_out = self._group_norm(parent.conv_norm_out, silu=True)  # type: ignore[arg-type]
                parent.conv_act = nn.Identity()
        # the largest first: what lies inside one is gone with it
        self._replace_in(model)

    def _replace_in(self, parent: nn.Module) -> None:
        for name, child in parent.named_children():
            replacement = self._replacement(child)
            if replacement is not None:
                setattr(parent, name, replacement)
            else:
                self._replace_in(child)

    def _replacement(self, layer: nn.Module) -> nn.Module | None:
        """None: the layer stays, and its parts are looked at."""
        kinds: dict[type[nn.Module], Callable[[Any], nn.Module | None]] = {
            BasicTransformerBlock: self._transformer_block,
            ResnetBlock2D: self._resnet_block,
            FeedForward: self._feed_forward,
            Attention: self._attention,
            nn.GroupNorm: lambda norm: self._group_norm(norm, silu=False),
            nn.LayerNorm: self._layer_norm,
        }
        make = kinds.get(type(layer))
        return make(layer) if make else None

    def _transformer_block(self, block: BasicTransformerBlock) -> nn.Module | None:
        parts = [block.norm1, block.attn1, block.norm2, block.attn2, block.norm3, block.ff]
        if block.attn2 is None:
            parts = [block.norm1, block.attn1, block.norm3, block.ff]
        if (
            block.norm_type != "layer_norm"
            or block.pos_embed is not None
            or block.only_cross_attention
            or hasattr(block, "fuser")
            or not all(type(part) is nn.LayerNorm and part.elementwise_affine for part in parts[:-1:2])
        ):
            return None
        norms = [self._layer_norm(part) for part in parts[:-1:2]]
        attentions = [self._attention(part) for part in parts[1:-1:2]]
        feed_forward = self._feed_forward(block.ff) or block.ff
        return ours.TransformerBlock([norm for norm in norms if norm], attentions, feed_forward)

    def _resnet_block(self, block: ResnetBlock2D) -> nn.Module:
        scales_and_shifts = block.time_embedding_norm == "scale_shift"
        has_silu = isinstance(block.nonlinearity, nn.SiLU)
        return ours.ResnetBlock(
            (
                self._group_norm(block.norm1, silu=has_silu),
                self._group_norm(block.norm2, silu=has_silu and not scales_and_shifts),
            ),
            (block.conv1, block.conv2),
            activation=block.nonlinearity,
            resample=block.upsample or block.downsample,
            time_projection=block.time_emb_proj,
            activates_time=not block.skip_time_act,
            scales_and_shifts=scales_and_shifts,
            shortcut=block.conv_shortcut,
            divisor=block.output_scale_factor,
        )

    def _feed_forward(self, layer: FeedForward) -> nn.Module | None:
        """None for an activation that the engine does not compute."""
        up, down = layer.net[0], layer.net[2]
        has_gate = isinstance(up, GEGLU | SwiGLU)
        if isinstance(up, GELU):
            kind = {"none": "gelu", "tanh": "gelu_tanh"}.get(up.approximate)
        elif isinstance(up, LinearActivation):
            kind = _ACTIVATIONS.get(type(up.activation))
        else:
            kind = {GEGLU: "gelu", SwiGLU: "silu", ApproximateGELU: "quick_gelu"}.get(type(up))
        if kind is None or not isinstance(down, nn.Linear):
            return None
        projection: Any = up.proj
        self.used.append(self.bindings["activation"])
        wide = self._projection(projection) if not has_gate else self._projection(*reversed(_halves(projection)))
        return ours.FeedForward(wide, kind, self._projection(down), has_gate=has_gate)

    def _attention(self, layer: Attention) -> nn.Module:
        assert layer.to_out is not None
        out: Any = layer.to_out[0]
        parts = [layer.to_q, layer.to_k, layer.to_v]
        groups = [parts[:1], parts[1:]] if layer.is_cross_attention else [parts]
        binding = attention_binding(
            self.bindings["attention"], layer.to_q.weight.device.type, len(layer.to_q.weight) // layer.heads
        )
        self.used.append(binding)
        return ours.Attention(
            [self._projection(*group) for group in groups],
            self._projection(out),
            heads=layer.heads,
            scale=layer.scale,
            binding=binding,
            group_norm=None if layer.group_norm is None else self._group_norm(layer.group_norm, silu=False),
            residual=layer.residual_connection,
            divisor=layer.rescale_output_factor,
        )

    def _group_norm(self, norm: nn.GroupNorm, *, silu: bool) -> ours.GroupNorm:
        binding = self.bindings["group_norm_silu" if silu else "group_norm"]
        self.used.append(binding)
        return ours.GroupNorm(norm, binding, silu=silu)

    def _layer_norm(self, norm: nn.LayerNorm) -> ours.LayerNorm | None:
        """None for a norm without weights."""
        if not norm.elementwise_affine:
            return None
        self.used.append(self.bindings["layer_norm"])
        return ours.LayerNorm(norm)

    def _projection(self, *linears: Any) -> ours.Projection:
        self.used.append(self.bindings["linear"])
        return ours.Projection(linears, self.bindings["linear"], self.scheme)


def check(name: str, model: nn.Module) -> None:
    """Raises ValueError naming the layer that the engine does not compute as it is, before anything is changed."""
    for path, layer in model.named_modules(prefix=name):
        processor = layer.get_processor() if hasattr(layer, "get_processor") else None  # type: ignore[operator]
        if processor is None:
            continue
        for why in _unknown(layer, processor):
            raise ValueError(f"{path}: {why} is not known to the engine; remove it, or leave out kernel_inject")
    for path, layer in model.named_modules(prefix=name):
        if type(layer) is FeedForward and any(
            type(part) is not nn.Linear for part in (layer.net[2], getattr(layer.net[0], "proj", None))
        ):
            raise ValueError(f"{path}: a linear with an adapter is not known to the engine; merge it into its weights")


def _unknown(layer: nn.Module, processor: object) -> Iterator[str]:
    if type(layer) is not Attention:
        yield f"attention of the kind {type(layer).__name__}"
        return
    if type(processor) not in _PROCESSORS:
        yield f"the attention processor {type(processor).__name__}"
    linears = [layer.to_q, layer.to_k, layer.to_v, layer.to_out and layer.to_out[0]]
    kinds = [type(linear).__name__ for linear in linears if type(linear) is not nn.Linear]
    if kinds:
        yield f"attention with a projection of the kind {kinds[0]}"
    for field in ("norm_q", "norm_k", "norm_cross", "spatial_norm", "add_k_proj"):
        if getattr(layer, field, None) is not None:
            yield f"attention with {field}"
    if layer.inner_kv_dim != layer.inner_dim:
        yield "attention with fewer heads of keys"
    if layer.fused_projections or layer.is_causal:
        yield "attention with fused projections" if layer.fused_projections else "causal attention"


def _halves(linear: nn.Linear) -> tuple[nn.Linear, nn.Linear]:
    """A linear whose outputs are two, as two."""
    halves = []
    for part in (0, 1):
        with torch.device("meta"):
            half = nn.Linear(linear.in_features, linear.out_features // 2, bias=linear.bias is not None)
        half.weight = nn.Parameter(linear.weight.detach().chunk(2)[part], requires_grad=False)
        if linear.bias is not None:
            half.bias = nn.Parameter(linear.bias.detach().chunk(2)[part], requires_grad=False)
        halves.append(half)
    return halves[0], halves[1]
