"""Policies for an architecture that has none, by its parameters' names and shapes and the common fields of its config.

What names and shapes leave open is a choice. `candidates` are policies with the choices made, the likeliest first; none
of them is to be trusted before it was held against the model's own answers (shared/engine/detection.py). Free of torch.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shared.models.architecture import QkNorm
from shared.policies.fields import Config, Fields, UnsupportedModelError
from shared.policies.names import Source, columns, grouped, ones, rows
from shared.policies.policy import Policy
from shared.policies.positions import alibi_slopes, windows_by_layer

Shape = tuple[int, ...]
Make = Callable[..., tuple[Source, ...]]
_MOST = 128  # candidates

# the common name of a config field -> what families call it
_FIELDS = {
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "num_query_groups"),
    "head_dim": ("head_dim", "kv_channels", "d_head", "attention_head_size"),
    "max_position_embeddings": (
        *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"),
        *("seq_length", "model_max_length", "context_length", "block_size"),
    ),
    "hidden_act": ("hidden_act", "hidden_activation", "activation_function", "activation", "act_fn", "mlp_activation"),
    "rms_norm_eps": (
        *("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon", "norm_eps"),
        *("layernorm_epsilon", "rms_norm_epsilon", "eps"),
    ),
    "rope_theta": ("rope_theta", "rotary_emb_base", "rope_base", "rotary_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct", "rope_pct"),
}
_ATTENTION = re.compile(r"(^|[._])(self_)?(attn|attention|att)([._]|$)", re.IGNORECASE)
_QKV = re.compile(r"qkv|query_key_value|w_pack|c_attn|in_proj|att_proj", re.IGNORECASE)
_PART = {
    part: re.compile(rf"^(w|to_)?{part[0]}($|_|\d|{part[1:]})", re.IGNORECASE) for part in ("query", "key", "value")
}
_DOWN = re.compile(r"down|fc_?2|4h_to_h|^w_?2$|fc_out|lin(ear)?_?2|^wo$|c_proj|proj_out|dense_2", re.IGNORECASE)
_GATE = re.compile(r"gate|^w_?1$|^wi_0$", re.IGNORECASE)
_OF_MLP = re.compile(r"feed_?forward|ffn?(_|$)|mlp", re.IGNORECASE)
_FIRST = re.compile(r"input|(ln|norm)_?1|attn|attention", re.IGNORECASE)
_POSITIONS = re.compile(r"pos|wpe", re.IGNORECASE)


@dataclass
class _Found:
    """What is certain so far, and the choices: each a list of (record's values, names), the likeliest first."""

    record: dict[str, object] = field(default_factory=dict)
    names: dict[str, tuple[Source, ...]] = field(default_factory=dict)
    choices: list[list[tuple[Mapping[str, object], Mapping[str, tuple[Source, ...]]]]] = field(default_factory=list)

    def choose(self, *options: tuple[Mapping[str, object], Mapping[str, tuple[Source, ...]]]) -> None:
        self.choices.append(list(options))

    def choose_value(self, name: str, *values: object) -> None:
        self.choose(*(({name: value}, {}) for value in values))


def candidates(shapes: Mapping[str, Shape], config: Config, ignored: Sequence[str] = ()) -> Iterator[Policy]:
    """The policies that fit, at most 128.

    shapes: of the model's parameters, by name, in the order of their definition. ignored: names of what else a
    checkpoint of it has. Raises UnsupportedModelError naming the parameter or the field that is not understood.
    """
    family = str(config.get("model_type") or "a model without model_type")
    prefix, layer, top = _split(shapes, family)
    values, renamed = _read(config)
    found = _Found()
    _top(found, _modules(top, family), values, family)
    _layer(found, _modules(layer, family), f"{prefix}.{{layer}}.", values, family)
    _positions(found, values)
    _settings(found, values)
    num_layers = len({name.removeprefix(f"{prefix}.").partition(".")[0] for name in shapes if name.startswith(prefix)})
    found.record |= {"num_layers": num_layers}
    windows = _windows(values, num_layers)
    if windows:
        found.choose_value("sliding_window", *windows)
    choices = sorted(
        itertools.product(*(range(len(options)) for options in found.choices)),
        key=lambda picks: (sum(pick > 0 for pick in picks), sum(picks)),
    )
    for picks in choices[:_MOST]:
        picked = [options[pick] for options, pick in zip(found.choices, picks, strict=True)]
        record, names = dict(found.record), dict(found.names)
        for more_values, more_names in picked:
            record |= more_values
            names |= more_names
        rotary = record.pop("rotary", "halves")
        yield Policy(
            family=family,
            names=names,
            base=prefix.partition(".")[0],
            ignored=tuple(map(re.escape, ignored)),
            fields=renamed,
            defaults={
                "num_hidden_layers": num_layers,
                "hidden_size": record["hidden_size"],
                "vocab_size": record["vocab_size"],
                "hidden_act": record.get("activation", "silu"),
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 2048,
            },
            record=record,
            rotary=rotary,  # pyright: ignore[reportArgumentType] - one of its three
        )


def _split(shapes: Mapping[str, Shape], family: str) -> tuple[str, dict[str, Shape], dict[str, Shape]]:
    """The layers' prefix, the parameters of the first of them, and those that are of none."""
    counts: dict[str, int] = {}
    for name in shapes:
        if match := re.match(r"(.*?)\.\d+\.", name):
            counts[match[1]] = counts.get(match[1], 0) + 1
    if not counts:
        raise _unknown(family, "no parameter's name has a layer's number")
    prefix = max(counts, key=counts.__getitem__)
    layers: dict[str, dict[str, Shape]] = {}
    top: dict[str, Shape] = {}
    for name, shape in shapes.items():
        if match := re.match(rf"{re.escape(prefix)}\.(\d+)\.(.+)", name):
            layers.setdefault(match[1], {})[match[2]] = shape
        else:
            top[name] = shape
    for index, layer in layers.items():
        if layer != layers["0"]:
            odd = next(iter(dict(layer.items() ^ layers["0"].items())))
            raise _unknown(family, f"layer {index} differs from layer 0 in {odd}")
    return prefix, layers["0"], top


@dataclass(frozen=True)
class _Module:
    name: str
    shape: Shape
    bias: bool

    @property
    def last(self) -> str:
        return self.name.rpartition(".")[2]


def _modules(shapes: Mapping[str, Shape], family: str) -> list[_Module]:
    found: list[_Module] = []
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        if kind == "bias" and f"{module}.weight" in shapes:
            continue
        if kind != "weight" or len(shape) not in (1, 2):
            raise _unknown(family, f"{name} {list(shape)} is none of the parameters that it looks for")
        found.append(_Module(module, shape, f"{module}.bias" in shapes))
    return found


def _read(config: Config) -> tuple[Fields, dict[str, str]]:
    """The config, and under which of its names the common fields are."""
    renamed: dict[str, str] = {}
    for common, names in _FIELDS.items():
        name = next((name for name in names if config.get(name) is not None), None)
        if name is not None and name != common:
            renamed[common] = name
    return Fields(config, renamed), renamed


def _top(found: _Found, modules: list[_Module], fields: Fields, family: str) -> None:
    tables = [module for module in modules if len(module.shape) == 2]
    norms = [module for module in modules if len(module.shape) == 1]
    learned = [table for table in tables if _POSITIONS.search(table.last)]
    words = [table for table in tables if table not in learned]
    if not words or len(words) > 2 or len(learned) > 1 or len({table.shape for table in words}) > 1:
        raise _unknown(family, f"of {', '.join(table.name for table in tables) or 'no table'} one embeds tokens")
    embedding, *heads = sorted(words, key=lambda table: re.search(r"head|out", table.name) is not None)
    vocab_size, hidden_size = embedding.shape
    found.record |= {"vocab_size": vocab_size, "hidden_size": hidden_size}
    found.names["embedding"] = rows(f"{embedding.name}.weight")
    tied = not heads or fields.flag("tie_word_embeddings")
    found.record |= {"tie_embeddings": tied, "lm_head_bias": bool(heads and heads[0].bias)}
    if heads:
        found.names |= _named("lm_head", heads[0])
    if learned:
        [positions] = learned
        found.names["positions"] = rows(f"{positions.name}.weight")
        count, context = positions.shape[0], fields.integer("max_position_embeddings", positions.shape[0])
        found.record["num_positions"] = count
        found.choose_value("position_offset", *dict.fromkeys((max(count - context, 0), 0)))
    of_embedding = [norm for norm in norms if re.search(r"emb", norm.name)]
    final = [norm for norm in norms if norm not in of_embedding]
    if len(of_embedding) > 1 or len(final) > 1:
        raise _unknown(family, f"{', '.join(norm.name for norm in norms)} are more norms than it knows places for")
    if of_embedding:
        found.record["embedding_norm"] = True
        found.names |= _named("embedding_norm", of_embedding[0])
    found.names |= _named("final_norm", final[0]) if final else {"final_norm.weight": ones()}


def _layer(found: _Found, modules: list[_Module], prefix: str, fields: Fields, family: str) -> None:
    hidden = int(str(found.record["hidden_size"]))
    linears = [module for module in modules if len(module.shape) == 2]
    norms = [module for module in modules if len(module.shape) == 1]
    attention = [one for one in linears if _ATTENTION.search(one.name) or _QKV.search(one.last)]
    attention = attention or [one for one in linears if any(part.match(one.last) for part in _PART.values())]
    mlp = [one for one in linears if one not in attention]
    in_attention = [norm for norm in norms if _ATTENTION.search(norm.name.rpartition(".")[0])]
    in_attention += [norm for norm in norms if norm not in in_attention and re.match(r"[qk]_", norm.last)]
    _attention(found, attention, in_attention, prefix, fields, family)
    _mlp(found, mlp, prefix, hidden, family)
    outer = [norm for norm in norms if norm not in in_attention]
    if any(norm.shape != (hidden,) for norm in outer):
        raise _unknown(family, f"a norm of {outer[0].name} is not of {hidden} numbers")
    _norms(found, outer, prefix, fields, family)


def _attention(
    found: _Found, linears: list[_Module], norms: list[_Module], prefix: str, fields: Fields, family: str
) -> None:
    hidden, heads = int(str(found.record["hidden_size"])), fields.integer("num_attention_heads")
    fused = next((one for one in linears if _QKV.search(one.last)), None)
    apart = [] if fused else [one for part in _PART.values() for one in linears if part.match(one.last)]
    made = [fused] if fused else apart
    output = [one for one in linears if one not in made]
    if len(output) != 1 or len(made) != (1 if fused else 3):
        raise _unknown(family, f"{', '.join(one.name for one in linears) or 'nothing'} is no attention that it knows")
    turned = fused is not None and fused.shape[0] == hidden != fused.shape[1]
    width = sum(one.shape[1 if turned else 0] for one in made)
    head_dim = fields.integer("head_dim", (hidden if fused else made[0].shape[0]) // max(heads, 1))
    kv_heads = (width // max(head_dim, 1) - heads) // 2
    found.record |= {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "qkv_bias": made[0].bias,
        "output_bias": output[0].bias,
    }
    found.names |= _named("output", output[0], prefix, columns if turned else rows)
    if fused is None:
        found.names |= _joined("qkv", made, prefix)
    elif turned:
        found.names |= _named("qkv", fused, prefix, columns)
    else:
        found.choose(({}, _named("qkv", fused, prefix, rows)), ({}, _named("qkv", fused, prefix, grouped)))
    if not norms:
        return
    of = {ours: next((norm for norm in norms if norm.last.startswith(ours)), None) for ours in ("q", "k")}
    q_norm, k_norm = of["q"], of["k"]
    if len(norms) != 2 or q_norm is None or k_norm is None:
        raise _unknown(family, f"{', '.join(norm.name for norm in norms)} are no norms of queries and keys")
    found.names |= _named("q_norm", q_norm, prefix) | _named("k_norm", k_norm, prefix)
    shared = q_norm.shape == (head_dim,)
    kinds = ("layer",) if q_norm.bias else ("rms", "layer")
    spans = (True,) if shared else (False, True)
    norm_kinds = [QkNorm(kind, q_norm.bias, per_head, shared) for per_head in spans for kind in kinds]
    found.choose_value("qk_norm", *norm_kinds)


def _mlp(found: _Found, linears: list[_Module], prefix: str, hidden: int, family: str) -> None:
    down = [one for one in linears if _DOWN.search(one.last)] or [one for one in linears if one.shape[0] == hidden]
    ups = [one for one in linears if one not in down]
    if len(down) != 1 or len(ups) not in (1, 2):
        raise _unknown(family, f"{', '.join(one.name for one in linears) or 'nothing'} is no MLP that it knows")
    turned = down[0].shape[1] == hidden != down[0].shape[0]
    inner = down[0].shape[0 if turned else 1]
    make = columns if turned else rows
    width = sum(one.shape[1 if turned else 0] for one in ups)
    if width not in (inner, 2 * inner):
        raise _unknown(family, f"{ups[0].name} is of {width} rows, and {down[0].name} of {inner} columns")
    found.record |= {"intermediate_size": inner, "gated": width == 2 * inner, "mlp_bias": down[0].bias}
    found.names |= _named("down", down[0], prefix, make)
    if len(ups) == 1:
        found.names |= _named("up", ups[0], prefix, make)
        return
    first, second = sorted(ups, key=lambda one: _GATE.search(one.last) is None)
    found.choose(({}, _joined("up", [first, second], prefix)), ({}, _joined("up", [second, first], prefix)))


def _norms(found: _Found, norms: list[_Module], prefix: str, fields: Fields, family: str) -> None:
    """Where they stand, and of which kind."""
    of_mlp = [norm for norm in norms if _OF_MLP.search(norm.last)]
    after = [norm for norm in norms if re.search(r"post|output|after", norm.last, re.IGNORECASE)]
    if not norms:
        found.names |= {"attention_norm.weight": ones(), "mlp_norm.weight": ones()}
    elif len(norms) == 1:
        found.record["parallel"] = True
        found.names |= _named("attention_norm", norms[0], prefix)
    elif len(norms) == 2:
        first, second = sorted(norms, key=lambda one: (one in of_mlp, one in after, not _FIRST.search(one.last)))
        before = _named("attention_norm", first, prefix) | _named("mlp_norm", second, prefix)
        behind = _named("attention_output_norm", first, prefix) | _named("mlp_output_norm", second, prefix)
        places: list[tuple[Mapping[str, object], Mapping[str, tuple[Source, ...]]]] = [
            ({"norm_order": "pre"}, before),
            ({"parallel": True, "parallel_norms": True}, before),
            ({"norm_order": "output"}, behind),
        ]
        found.choose(*(reversed(places) if len(after) == 2 else places))
    elif len(norms) == 4 and len(of_mlp) == len(after) == 2:
        found.record["norm_order"] = "sandwich"
        for norm in norms:
            place = f"{'mlp' if norm in of_mlp else 'attention'}{'_output' if norm in after else ''}_norm"
            found.names |= _named(place, norm, prefix)
    else:
        raise _unknown(family, f"{', '.join(norm.name for norm in norms)} are norms that it knows no places for")
    found.record["norm_bias"] = bool(norms) and norms[0].bias
    layer, rms = {"norm": "layer"}, {"norm": "rms"}
    offset = {"norm": "rms", "norm_offset": 1.0}
    likely_layer = not norms or "layer" in fields.name("rms_norm_eps")
    if norms and norms[0].bias:
        found.record |= layer
    elif likely_layer:
        found.choose((layer, {}), (rms, {}))
    else:
        found.choose((rms, {}), (layer, {}), (offset, {}))


def _positions(found: _Found, fields: Fields) -> None:
    heads = int(str(found.record["num_heads"]))
    if "positions" in found.names:
        found.record["rotary"] = None
    elif fields.get("alibi") is True or fields.get("position_embedding_type") == "alibi":
        found.record |= {"rotary": None, "alibi_slopes": alibi_slopes(heads)}
    else:
        found.choose_value("rotary", "halves", "interleaved", None)


def _settings(found: _Found, fields: Fields) -> None:
    """Numbers that some configs have, and what they stand for."""
    hidden = int(str(found.record["hidden_size"]))
    for name, ours in (
        ("embedding_multiplier", "embedding_scale"),
        ("residual_multiplier", "output_scale"),
        ("attention_multiplier", "attention_scale"),
        ("logit_scale", "logit_scale"),
        ("final_logit_softcapping", "logit_cap"),
        ("attn_logit_softcapping", "attention_cap"),
        ("clip_qkv", "qkv_clip"),
    ):
        if fields.get(name) is not None:
            found.record[ours] = fields.number(name)
    if fields.get("logits_scaling"):
        found.record["logit_scale"] = 1 / fields.number("logits_scaling")
    if fields.get("query_pre_attn_scalar"):
        found.record["attention_scale"] = fields.number("query_pre_attn_scalar") ** -0.5
    if "embedding_scale" not in found.record:
        found.choose_value("embedding_scale", 1.0, hidden**0.5)
    if fields.get("hidden_act") is None:
        gated = found.record["gated"]
        found.choose_value("activation", *(("silu", "gelu_tanh") if gated else ("gelu_tanh", "gelu", "relu")))
    if fields.get("rms_norm_eps") is None:
        found.choose_value("norm_eps", 1e-5, 1e-6)


def _windows(fields: Fields, num_layers: int) -> list[tuple[int | None, ...]]:
    """What a window of the config may apply to."""
    none: tuple[int | None, ...] = (None,) * num_layers
    if fields.get("sliding_window") is None or fields.get("use_sliding_window") is False:
        return []
    if fields.get("layer_types") is not None:
        values = {**fields.values, "num_hidden_layers": num_layers}
        return list(dict.fromkeys((windows_by_layer(Fields(values)), none)))
    return [(fields.integer("sliding_window"),) * num_layers, none]


def _named(ours: str, module: _Module, prefix: str = "", make: Make = rows) -> dict[str, tuple[Source, ...]]:
    kinds = ("weight", "bias") if module.bias else ("weight",)
    return {f"{ours}.{kind}": make(f"{prefix}{module.name}.{kind}") for kind in kinds}


def _joined(ours: str, modules: Sequence[_Module], prefix: str) -> dict[str, tuple[Source, ...]]:
    kinds = ("weight", "bias") if all(module.bias for module in modules) else ("weight",)
    return {f"{ours}.{kind}": rows(*(f"{prefix}{module.name}.{kind}" for module in modules)) for kind in kinds}


def _unknown(family: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "model_type", f"{family!r} has no policy, and none is found: {why}; give one by injection_policy"
    )
