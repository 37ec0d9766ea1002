"""The parameters of an architecture by our names, and their shapes. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator

from shared.models.architecture import Architecture

Shapes = dict[str, tuple[int, ...]]

# Linear layers of a layer, which may be quantized; what stands beside them decides where tokens go, or how much
LINEARS = ("qkv", "output", "up", "down", "shared_up", "shared_down")
EXPERTS = ("experts_up", "experts_down")


def model_shapes(a: Architecture) -> Shapes:
    """What is not of a layer."""
    shapes: Shapes = {"embedding": (a.vocab_size, a.hidden_size)}
    if a.num_positions:
        shapes["positions"] = (a.num_positions, a.hidden_size)
    if a.token_types:
        shapes["token_types"] = (a.token_types, a.hidden_size)
    if a.embedding_norm:
        shapes |= _norm(a, "embedding_norm")
    if a.final_norm:
        shapes |= _norm(a, "final_norm")
    if a.lm_head:
        if not a.tie_embeddings:
            shapes["lm_head.weight"] = (a.vocab_size, a.hidden_size)
        if a.lm_head_bias:
            shapes["lm_head.bias"] = (a.vocab_size,)
    if a.patches:
        shapes["patches.weight"] = (a.hidden_size, a.patches.values)
    return shapes


def layer_shapes(a: Architecture, layer: int) -> Shapes:
    """What a layer has. Experts' have an axis of experts before the others."""
    has_norm, has_output_norm = a.norm_order != "output", a.norm_order in ("output", "sandwich")
    shapes: Shapes = {}
    if has_norm:
        shapes |= _norm(a, "attention_norm")
    shapes |= _linear("qkv", a.qkv_size, a.hidden_size, a.qkv_bias)
    for part, heads in (("q_norm", a.num_heads), ("k_norm", a.num_kv_heads)):
        if a.qk_norm:
            width = (a.head_dim if a.qk_norm.shared else heads * a.head_dim,)
            shapes |= {f"{part}.weight": width, **({f"{part}.bias": width} if a.qk_norm.bias else {})}
    shapes |= _linear("output", a.hidden_size, a.num_heads * a.head_dim, a.output_bias)
    if has_output_norm:
        shapes |= _norm(a, "attention_output_norm")
    if has_norm and (not a.parallel or a.parallel_norms):
        shapes |= _norm(a, "mlp_norm")
    if a.has_experts(layer):
        shapes |= _expert_shapes(a, a.num_experts(layer))
    else:
        shapes |= _linear("up", a.up_size, a.hidden_size, a.mlp_bias)
        shapes |= _linear("down", a.hidden_size, a.intermediate_size, a.mlp_bias)
    if has_output_norm:
        shapes |= _norm(a, "mlp_output_norm")
    return shapes


def _expert_shapes(a: Architecture, count: int) -> Shapes:
    experts = a.experts
    if experts is None:
        return {}
    hidden, width, shared = a.hidden_size, experts.intermediate_size, experts.shared_size
    shapes: Shapes = {"router.weight": (count, hidden)}
    for name, outputs, inputs in (("experts_up", a.up_size_of(width), hidden), ("experts_down", hidden, width)):
        of_each = _linear(name, outputs, inputs, experts.bias)
        shapes |= {ours: (count, *shape) for ours, shape in of_each.items()}
    if shared:
        shapes |= _linear("shared_up", a.up_size_of(shared), hidden, experts.bias)
        shapes |= _linear("shared_down", hidden, shared, experts.bias)
        shapes |= _linear("shared_gate", 2 if experts.residual else 1, hidden, experts.residual and experts.bias)
    return shapes


def _norm(a: Architecture, name: str) -> Shapes:
    width = (a.hidden_size,)
    return {f"{name}.weight": width, **({f"{name}.bias": width} if a.norm_bias else {})}


def _linear(name: str, out_features: int, in_features: int, bias: bool) -> Shapes:
    return {f"{name}.weight": (out_features, in_features), **({f"{name}.bias": (out_features,)} if bias else {})}


def modules_of(shapes: Shapes) -> Iterator[str]:
    """The names before `.weight`, or those that have none of it, in order."""
    return iter(dict.fromkeys(name.removesuffix(".weight").removesuffix(".bias") for name in shapes))
