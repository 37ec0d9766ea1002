"""A family's layers as DeepSpeed's kernel injection saves them: its names behind the layer's, the rest as before."""

from dataclasses import replace

from shared.policies.names import rows
from shared.policies.policy import Policy

# our module -> DeepSpeed's weight and bias; queries, keys and values lie one after the other
_LAYER = {
    "attention_norm": ("norm_w", "norm_b"),
    "qkv": ("attention.attn_qkvw", "attention.attn_qkvb"),
    "output": ("attention.attn_ow", "attention.attn_ob"),
    "mlp_norm": ("mlp.attn_nw", "mlp.attn_nb"),
    "up": ("mlp.inter_w", "mlp.inter_b"),
    "down": ("mlp.output_w", "mlp.output_b"),
}


def as_injected(policy: Policy) -> Policy:
    """The same family with such layers, of a plain MLP: of a gated one the order of the halves is another."""
    layer = policy.names["qkv.weight"][0].names[0].partition("{layer}.")[0] + "{layer}."
    names = {
        f"{ours}.{kind}": rows(layer + theirs)
        for ours, both in _LAYER.items()
        for kind, theirs in zip(("weight", "bias"), both, strict=True)
    }
    biases = r".*\.(attn_[oqkv]+b|inter_b|output_b|attn_nb|norm_b)"
    return replace(policy, names={**policy.names, **names}, ignored=(*policy.ignored, biases))
