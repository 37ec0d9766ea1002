"""Which linears of a module's layers are cut by their outputs, and which by their inputs: the search of AutoTP.

A layer is what an nn.ModuleList holds. In it a linear ends a sub-layer, so that its inputs are cut and the ranks' sums
added, if what follows it is a norm (the first norm of a layer follows the last linear), or if its name says so. Every
other linear is cut by its outputs. What chooses experts, and what reads or makes a latent that all heads share, stays
whole. A policy of suffixes says it for the modules of its classes instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from torch import nn

from shared.engine.split_attention import is_attention_input
from shared.policies.policy import UnsupportedModelError

Role = Literal["column", "row"]
Suffixes = Mapping[type[nn.Module], tuple[str, ...]]

# DeepSpeed's AutoTP rejects these; gpt2's linears are transposed
_REJECTED = ("deberta", "deberta-v2", "flaubert", "fsmt", "gpt2", "led", "longformer", "xlm", "xlnet")
_ROWS = ("out_proj", "o_proj", "down_proj", "out_lin", "wo", "w2", "fc2", "fc_out", "lin2", "c_proj", "dense_4h_to_h")
_NORMS = ("layer_norm", "ln_1", "ln_2")
_WHOLE = ("router", "shared_expert_gate", "q_a_proj", "kv_a_proj_with_mqa")


def roles_of(model: nn.Module, suffixes: Suffixes | None, family: str) -> dict[str, Role]:
    """By the linears' names. family: the config's model_type.

    Raises UnsupportedModelError for a family that is rejected, a model without layers or one whose linears are none.
    """
    if suffixes is None and family in _REJECTED:
        raise UnsupportedModelError(
            "model_type", f"AutoTP rejects {family!r}; set kernel_inject, or name its linears by an injection_policy"
        )
    roles: dict[str, Role] = {}
    if suffixes is None:
        for name, layer in _layers_of(model):
            roles |= _searched(name, layer)
    else:
        for name, layer, ends in _named_by(model, suffixes):
            linears = _linears_of(name, layer)
            roles |= {path: "row" if path.endswith(ends) else "column" for path in linears}
    if "row" not in roles.values():
        raise UnsupportedModelError(
            "architectures",
            f"AutoTP not supported for {type(model).__name__}: it finds no linears in an nn.ModuleList of layers; "
            "name them by an injection_policy",
        )
    return roles


def _layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost ones."""
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{layer}.") for layer in found):
            continue
        for index, layer in enumerate(module):
            if not isinstance(layer, nn.Linear):
                found.append(f"{name}.{index}" if name else str(index))
                yield found[-1], layer


def _named_by(model: nn.Module, suffixes: Suffixes) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    for name, module in model.named_modules():
        ends = tuple(suffix for kind, own in suffixes.items() if isinstance(module, kind) for suffix in own)
        if ends:
            yield name, module, ends


def _linears_of(name: str, layer: nn.Module) -> dict[str, nn.Linear]:
    """Those that can be cut, by their names in the model. Raises UnsupportedModelError for another kind."""
    linears: dict[str, nn.Linear] = {}
    for path, module in layer.named_modules(prefix=name):
        if type(module).__name__ == "Conv1D":
            raise UnsupportedModelError(
                "architectures", f"{path} is a Conv1D, whose weight is transposed; set kernel_inject"
            )
        if isinstance(module, nn.Linear) and not _stays_whole(path, layer, name):
            linears[path] = module
    return linears


def _searched(name: str, layer: nn.Module) -> dict[str, Role]:
    linears = _linears_of(name, layer)
    in_order = [
        (path, path in linears)
        for path, module in layer.named_modules(prefix=name)
        if path in linears or _is_norm(path, module)
    ]
    roles: dict[str, Role] = {}
    for index, (path, is_linear) in enumerate(in_order):
        if is_linear:
            before_norm = not in_order[(index + 1) % len(in_order)][1]
            is_row = not is_attention_input(path) and (before_norm or _is_named_row(path))
            roles[path] = "row" if is_row else "column"
    return roles


def _is_norm(path: str, module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    return kind.endswith("norm") or path.rpartition(".")[2] in _NORMS


def _is_named_row(path: str) -> bool:
    parent, _, leaf = path.rpartition(".")
    holder = parent.rpartition(".")[2].lower()
    return leaf in _ROWS or (leaf in ("dense", "o") and ("attn" in holder or "attention" in holder))


def _stays_whole(path: str, layer: nn.Module, prefix: str) -> bool:
    parent, _, leaf = path.rpartition(".")
    if leaf == "gate":
        holder = layer.get_submodule(parent.removeprefix(prefix).removeprefix("."))
        return any(name == "experts" for name, _ in holder.named_children())
    return leaf in _WHOLE
