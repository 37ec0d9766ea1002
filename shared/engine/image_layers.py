"""Layers of image models on the engine's ops: norms with what follows them, attention, feed-forward, residual block.

Each takes the place of a layer of diffusers and is called as that one is. Which op computes what is a Binding: on a CPU
some of torch's are the faster ones (image_bindings.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.activation import activate, gated
from kernels.attention import dense_attention
from kernels.group_norm import group_norm
from kernels.layer_norm import add_layer_norm, layer_norm
from kernels.linear import LinearWeight, linear
from shared.engine.image_bindings import Binding
from shared.models.quantization import Scheme


class Projection(nn.Module):
    """Linears of the same input as one, back to back: y = x @ cat(weights).T + cat(biases)."""

    def __init__(self, linears: Sequence[nn.Linear], binding: Binding, scheme: Scheme | None) -> None:
        super().__init__()
        weight = torch.cat([each.weight.detach() for each in linears])
        bias = None
        if any(each.bias is not None for each in linears):
            bias = torch.cat(
                [each.weight.new_zeros(len(each.weight)) if each.bias is None else each.bias for each in linears]
            ).detach()
        self.sizes = [len(each.weight) for each in linears]
        how = scheme and scheme.of(weight.shape[1])
        self.packed = LinearWeight(weight, bias, how) if binding.implementation == "engine" else None
        if self.packed is None:
            self.weight = nn.Parameter(weight, requires_grad=False)
            self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, in] -> [rows, sum of the outputs]."""
        if self.packed is None:
            return functional.linear(x, self.weight, self.bias)
        return linear(x.contiguous(), self.packed, own_bits=False)

    def _save_to_state_dict(self, destination: Any, prefix: Any, keep_vars: Any) -> NoReturn:
        raise RuntimeError("an injected model is not saved: its weights are packed. Save it before init_inference")


class GroupNorm(nn.Module):
    """GroupNorm of [batch, channels, ...], with the SiLU after it if asked."""

    def __init__(self, norm: nn.GroupNorm, binding: Binding, *, silu: bool) -> None:
        super().__init__()
        self.binding = binding
        self.num_groups, self.eps, self.silu = norm.num_groups, norm.eps, silu
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor, *, in_place: bool = False) -> Tensor:
        """in_place: x is the caller's own, and needed no more."""
        x = x.contiguous()
        flat = x.view(*x.shape[:2], -1)
        if self.binding.implementation == "torch":
            y = functional.group_norm(flat, self.num_groups, self.weight, self.bias, self.eps).view_as(x)
            return functional.silu(y) if self.silu else y
        out = flat if in_place else None
        return group_norm(flat, self.num_groups, self.weight, self.bias, self.eps, silu=self.silu, out=out).view_as(x)


class LayerNorm(nn.Module):
    """LayerNorm of the last dimension, alone or after a residual addition."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.eps, self.weight, self.bias = norm.eps, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return layer_norm(rows, self.weight, self.bias, self.eps).view(x.shape)

    def add(self, x: Tensor, residual: Tensor, *, in_place: bool) -> tuple[Tensor, Tensor]:
        """[rows, width] both -> the norm of their sum, and the sum, which is written over the residual if in_place."""
        out = residual if in_place else None
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps, residual_out=out)


class FeedForward(nn.Module):
    """down(f(up(x))), or with a gate: down(f(gate) * up)."""

    def __init__(self, up: Projection, kind: str, down: Projection, *, has_gate: bool) -> None:
        """up: with a gate, of the gate and then of up. kind: as kernels/activation.py names f."""
        super().__init__()
        self.up, self.kind, self.down, self.has_gate = up, kind, down, has_gate

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = self.up(hidden_states.reshape(-1, hidden_states.shape[-1]))
        inner = gated(wide, self.kind) if self.has_gate else activate(wide, self.kind, out=wide)
        return self.down(inner).view(*hidden_states.shape[:-1], -1)


class Attention(nn.Module):
    """Attention among the rows of an image, or from them to an encoder's, with the projections around it.

    Scores are float32 whatever the dtype. A mask is a bias of scores that the engine's op does not take: with one,
    torch computes.
    """

    def __init__(
        self,
        project_in: Sequence[Projection],
        project_out: Projection,
        *,
        heads: int,
        scale: float,
        binding: Binding,
        group_norm: nn.Module | None = None,
        residual: bool = False,
        divisor: float = 1.0,
    ) -> None:
        """project_in: of q, k and v; or of q, and of k and v, where these are another sequence's."""
        super().__init__()
        self.project_in, self.project_out, self.group_norm = nn.ModuleList(project_in), project_out, group_norm
        self.heads, self.scale, self.residual, self.divisor = heads, scale, residual, divisor
        self.binding = binding

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,  # of a norm that this layer does not have
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states [batch, tokens, width] or [batch, width, height, width in pixels]; the same comes out.

        attention_mask: added to scores, [batch, tokens or 1, tokens of k]. Raises ValueError for other arguments, as
        adapters have them.
        """
        if any(value is not None for value in kwargs.values()):
            raise ValueError(f"cross_attention_kwargs: {', '.join(kwargs)} not taken by a model with kernel injection")
        x = hidden_states
        if x.dim() == 4:
            x = x.flatten(2)
            x = (x if self.group_norm is None else self.group_norm(x)).transpose(1, 2)
        elif self.group_norm is not None:
            x = self.group_norm(x.transpose(1, 2)).transpose(1, 2)
        out = self.project_out(self._attend(x, encoder_hidden_states, attention_mask))
        out = out.view(*x.shape[:2], -1)
        if hidden_states.dim() == 4:
            out = out.transpose(1, 2).reshape(hidden_states.shape)
        if self.residual:
            out = out + hidden_states
        return out if self.divisor == 1 else out / self.divisor

    def get_processor(self) -> Attention:
        """What diffusers lists as the processor: the layer itself."""
        return self

    def set_processor(self, processor: object) -> NoReturn:
        raise ValueError(
            f"{type(processor).__name__}: an injected model's attention is not exchanged; set processors before "
            "init_inference, or leave out kernel_inject"
        )

    def _attend(self, x: Tensor, encoder: Tensor | None, mask: Tensor | None) -> Tensor:
        batch, tokens, _ = x.shape
        other = x if encoder is None else encoder
        x, keys = x.reshape(-1, x.shape[-1]), other.shape[1]
        first, last = self.project_in[0], self.project_in[-1]
        of_x = first(x)
        of_other = of_x if last is first and encoder is None else last(other.reshape(-1, other.shape[-1]))
        width = of_x.shape[1] if last is not first else of_x.shape[1] // 3
        q = of_x[:, :width].unflatten(1, (self.heads, -1))
        k, v = (part.unflatten(1, (self.heads, -1)) for part in of_other[:, -2 * width :].chunk(2, 1))
        if mask is None and self.binding.implementation == "engine":
            lengths = torch.arange(batch + 1, dtype=torch.int32, device=x.device)
            return dense_attention(
                q, k, v, lengths * tokens, lengths * keys, self.scale, causal=False, max_seqlen_k=keys
            )
        if mask is not None:
            if mask.dim() != 3 or mask.shape[0] not in (1, batch) or mask.shape[2] != keys:
                raise ValueError(f"attention_mask: {list(mask.shape)}, wants [{batch}, {tokens} or 1, {keys}]")
            mask = mask.unsqueeze(1).to(x.dtype)
        q, k, v = (part.unflatten(0, (batch, -1)).transpose(1, 2) for part in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return out.transpose(1, 2).reshape(batch * tokens, -1)


class TransformerBlock(nn.Module):
    """Attention, attention to an encoder's states, feed-forward, each after a norm that adds what came before it."""

    def __init__(self, norms: Sequence[LayerNorm], attentions: Sequence[nn.Module], feed_forward: nn.Module) -> None:
        """One norm more than attentions, the last before the feed-forward."""
        super().__init__()
        self.norm1, self.norms, self.attentions = norms[0], nn.ModuleList(norms[1:]), nn.ModuleList(attentions)
        self.feed_forward = feed_forward

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states [batch, tokens, width] -> the same. The encoder's states are those of all but the first."""
        shape, others = hidden_states.shape, cross_attention_kwargs or {}
        states = [None, *[encoder_hidden_states] * (len(self.attentions) - 1)]
        masks = [attention_mask, *[encoder_attention_mask] * (len(self.attentions) - 1)]
        residual = hidden_states.reshape(-1, shape[-1]).contiguous()
        normed = self.norm1(residual)
        own = False  # whether the residual's memory is: that of the first sum is, and later ones are written over it
        for attention, norm, state, mask in zip(self.attentions, self.norms, states, masks, strict=True):
            attended = attention(normed.view(shape), encoder_hidden_states=state, attention_mask=mask, **others)
            assert isinstance(norm, LayerNorm)
            normed, residual = norm.add(attended.view(residual.shape), residual, in_place=own)
            own = True
        return residual.add_(self.feed_forward(normed)).view(shape)


class ResnetBlock(nn.Module):
    """Two convolutions, each after a GroupNorm and an activation; the embedding of the time step between them."""

    def __init__(
        self,
        norms: tuple[GroupNorm, GroupNorm],
        convolutions: tuple[nn.Module, nn.Module],
        *,
        activation: nn.Module,
        resample: Callable[[Tensor], Tensor] | None,
        time_projection: nn.Module | None,
        activates_time: bool,
        scales_and_shifts: bool,
        shortcut: nn.Module | None,
        divisor: float,
    ) -> None:
        """A norm that has its SiLU inside is followed by no activation; that of time has one all the same."""
        super().__init__()
        self.norm1, self.norm2 = norms
        self.conv1, self.conv2 = convolutions
        self.activation, self.resample, self.time_projection = activation, resample, time_projection
        self.activates_time, self.scales_and_shifts = activates_time, scales_and_shifts
        self.shortcut, self.divisor = shortcut, divisor

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        """input_tensor [batch, channels, height, width]; temb [batch, width of the embedding]."""
        hidden = self._activated(self.norm1, self.norm1(input_tensor))
        if self.resample is not None:
            input_tensor, hidden = self.resample(input_tensor), self.resample(hidden)
        hidden = self.conv1(hidden)
        if self.time_projection is not None and temb is not None:
            temb = self.time_projection(self.activation(temb) if self.activates_time else temb)[:, :, None, None]
        if self.scales_and_shifts:
            if temb is None:
                raise ValueError("temb: this block scales and shifts by it, and there is none")
            factor, shift = temb.chunk(2, 1)
            hidden = self.norm2(hidden, in_place=True) * (1 + factor) + shift
        else:
            hidden = self.norm2(hidden if temb is None else hidden + temb, in_place=True)
        hidden = self.conv2(self._activated(self.norm2, hidden))
        if self.shortcut is not None:
            input_tensor = self.shortcut(input_tensor)
        return (input_tensor + hidden) / self.divisor

    def _activated(self, norm: GroupNorm, x: Tensor) -> Tensor:
        return x if norm.silu else self.activation(x)
