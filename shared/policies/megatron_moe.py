"""DeepSpeed-MoE's GPT: Megatron-LM's with experts in every so-many-th layer, perhaps more in the last ones (a pyramid),
and perhaps an MLP beside them (residual).

The config has the names of Megatron's arguments, or GPT-2's. The checkpoint's names are those of its state dict, whose
fused rows are head by head, or the flat ones of shared/checkpoint/megatron.py, whose rows are in order.
"""

from collections.abc import Mapping

from shared.models.architecture import Experts
from shared.policies.fields import Fields, UnsupportedModelError
from shared.policies.gpt2 import GPT_RECORD, gpt_rest
from shared.policies.names import Names, Source, affine, either, grouped, rows
from shared.policies.policy import Policy

_FLAT, _NESTED = "transformer.layers.{layer}.", "language_model.encoder.layers.{layer}."
_EMBEDDING, _EXPERT = "language_model.embedding.", "experts.deepspeed_experts.{expert}."


def _named(ours: str, flat: str, nested: str, make=rows) -> Names:
    """A weight and a bias under either name; make: of the state dict's."""
    kinds = ("weight", "bias")
    return {f"{ours}.{kind}": either(rows(f"{flat}.{kind}"), make(f"{nested}.{kind}")) for kind in kinds}


def _of_layer(ours: str, theirs: str) -> Names:
    return _named(ours, _FLAT + theirs, _NESTED + theirs)


def _of_mixture(theirs: str) -> tuple[Source, ...]:
    """A residual mixture has had it a level deeper."""
    places = [f"{layer}mlp.{level}deepspeed_moe.{theirs}" for layer in (_FLAT, _NESTED) for level in ("", "moe.")]
    return either(*map(rows, places))


def counts_of(fields: Fields) -> tuple[int, ...]:
    """Experts of each layer. `num_experts`: one number for all layers that have any, or one for each of them; a layer
    of 1 is a layer with an MLP."""
    num_layers, interval = fields.integer("num_hidden_layers"), fields.integer("expert_interval", 2)
    given = fields.get("num_experts", [1])
    numbers = fields.integers("num_experts") if isinstance(given, list) else (fields.integer("num_experts", 1),)
    places = [layer for layer in range(num_layers) if interval and (layer + 1) % interval == 0]
    if len(numbers) not in (1, len(places)):
        raise UnsupportedModelError(
            "num_experts", f"has {len(numbers)} numbers, and {len(places)} layers have experts: give one, or so many"
        )
    every = numbers * len(places) if len(numbers) == 1 else numbers
    counts = dict(zip(places, every, strict=True))
    return tuple(count if (count := counts.get(layer, 1)) > 1 else 0 for layer in range(num_layers))


def _rest(fields: Fields) -> Mapping[str, object]:
    counts, k = counts_of(fields), fields.integer("topk", 1)
    mlp_type = fields.get("mlp_type", "standard")
    if mlp_type not in ("standard", "residual"):
        raise UnsupportedModelError("mlp_type", f"{mlp_type!r} is not standard or residual")
    if not any(counts):
        return gpt_rest(fields)
    fewest = min(count for count in counts if count)
    if not 1 <= k <= fewest:
        raise UnsupportedModelError("topk", f"{k}, and there are layers of {fewest} experts")
    width = fields.integer("intermediate_size", 4 * fields.integer("hidden_size"))
    experts = Experts(
        counts=counts,
        per_token=k,
        intermediate_size=width,
        renormalize=k > 1,
        shared_size=width if mlp_type == "residual" else 0,
        residual=mlp_type == "residual",
        bias=True,
    )
    return {**gpt_rest(fields), "experts": experts}


MEGATRON_MOE = Policy(
    family="megatron_gpt_moe",
    base="language_model",
    fields={
        "num_hidden_layers": ("num_layers", "n_layer", "num_hidden_layers"),
        "hidden_size": ("hidden_size", "n_embd"),
        "num_attention_heads": ("num_attention_heads", "n_head"),
        "intermediate_size": ("ffn_hidden_size", "n_inner", "intermediate_size"),
        "max_position_embeddings": ("max_position_embeddings", "n_positions"),
        "vocab_size": ("padded_vocab_size", "vocab_size"),
        "rms_norm_eps": ("layernorm_epsilon", "layer_norm_epsilon"),
        "hidden_act": "activation_function",
    },
    defaults={
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    record=GPT_RECORD,
    rest=_rest,
    rotary=None,
    names={
        "embedding": either(rows("word_embeddings.weight"), rows(_EMBEDDING + "word_embeddings.weight")),
        "positions": either(rows("position_embeddings.weight"), rows(_EMBEDDING + "position_embeddings.weight")),
        **_named("final_norm", "transformer.final_layernorm", "language_model.encoder.final_layernorm"),
        **_of_layer("attention_norm", "input_layernorm"),
        **_named("qkv", _FLAT + "attention.query_key_value", _NESTED + "self_attention.query_key_value", grouped),
        **_named("output", _FLAT + "attention.dense", _NESTED + "self_attention.dense"),
        **_of_layer("mlp_norm", "post_attention_layernorm"),
        **_of_layer("up", "mlp.dense_h_to_4h"),
        **_of_layer("down", "mlp.dense_4h_to_h"),
        "router.weight": _of_mixture("gate.wg.weight"),
        **affine("experts_up", _EXPERT + "dense_h_to_4h", _of_mixture),
        **affine("experts_down", _EXPERT + "dense_4h_to_h", _of_mixture),
        **_of_layer("shared_up", "mlp.mlp.dense_h_to_4h"),
        **_of_layer("shared_down", "mlp.mlp.dense_4h_to_h"),
        **_of_layer("shared_gate", "mlp.coefficient"),
    },
)
