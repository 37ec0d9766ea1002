"""Layers of torch whose weights are quantized, for a model that computes by its own code.

    quantize_modules(model, {"lm_head": Quantization(4, 64)}, dtype=torch.bfloat16, device="cpu")

nn.Linear and Conv1D (GPT-2's, [in, out]) become QuantizedLinear, nn.Embedding becomes QuantizedEmbedding. Subclasses of
theirs do more than these do, and stay as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.linear import LinearWeight, linear
from kernels.quantization import Integers, Quantization, quantize
from shared.checkpoint import Checkpoint, CheckpointError, place_of
from shared.checkpoint.integers import serves
from shared.models.quantization import Scheme


class QuantizedModule(nn.Module, ABC):
    """A layer without parameters of its own: what it has is packed, and is neither moved nor saved."""

    def __init__(self, shape: tuple[int, int], how: Quantization, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.shape, self.how, self.compute_dtype, self.device = shape, how, dtype, torch.device(device)

    @abstractmethod
    def take(self, weight: Tensor | Integers, bias: Tensor | None = None) -> None:
        """weight: [out, in], or quantized already. Raises ValueError for another shape."""

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.how}"

    def _checked(self, weight: Tensor | Integers) -> Tensor | Integers:
        values = weight.values if isinstance(weight, Integers) else weight
        if tuple(values.shape) != self.shape:
            raise ValueError(f"wants {list(self.shape)}, has {list(values.shape)}")
        if isinstance(weight, Tensor):
            return weight.detach().to(self.device, self.compute_dtype)
        parts = (weight.values, weight.scale, weight.offset)
        values, scale, offset = (None if part is None else part.to(self.device) for part in parts)
        assert values is not None
        assert scale is not None
        return Integers(weight.bits, values, scale, offset, weight.floating)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        asked = fn(torch.empty(0, dtype=self.compute_dtype, device=self.device))
        if (asked.dtype, asked.device.type) != (self.compute_dtype, self.device.type):
            raise RuntimeError(
                f"quantized layers compute in {self.compute_dtype} on {self.device}, and cannot be made {asked.dtype} "
                f"on {asked.device}; give init_inference the dtype"
            )
        return self

    def _save_to_state_dict(self, destination: Any, prefix: Any, keep_vars: Any) -> NoReturn:
        raise RuntimeError("a quantized layer's weight is packed; have it saved by save_mp_checkpoint_path")

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Quantizes what it is given."""
        if f"{prefix}weight" not in state_dict:
            missing_keys.append(f"{prefix}weight")
            return
        try:
            self.take(state_dict[f"{prefix}weight"], state_dict.get(f"{prefix}bias"))
        except ValueError as error:
            error_msgs.append(f"{prefix}weight: {error}")


class QuantizedLinear(QuantizedModule):
    """x @ weight.T + bias, of a packed weight; behind nn.Linear's interface."""

    def __init__(
        self, shape: tuple[int, int], how: Quantization, dtype: torch.dtype, device: str, *, turned: bool = False
    ) -> None:
        """turned: weights come [in, out]."""
        super().__init__(shape, how, dtype, device)
        self.out_features, self.in_features = shape
        self.turned = turned
        self.packed: LinearWeight | None = None

    def take(self, weight: Tensor | Integers, bias: Tensor | None = None) -> None:
        weight = weight.T if self.turned and isinstance(weight, Tensor) else weight
        weight = self._checked(weight)
        bias = None if bias is None else bias.detach().to(self.device, self.compute_dtype)
        if isinstance(weight, Integers) and serves(weight, self.how):
            self.packed = LinearWeight.of_integers(weight, bias, self.compute_dtype, dynamic=self.how.dynamic)
            return
        floats = weight.dequantize().to(self.compute_dtype) if isinstance(weight, Integers) else weight
        self.packed = LinearWeight(floats.contiguous(), bias, self.how)

    @property
    def weight(self) -> Tensor:
        """[out, in]: what is computed with, made anew each time; for code that looks at it."""
        return self._weight.dequantize().to(self.compute_dtype)

    @property
    def bias(self) -> Tensor | None:
        return self._weight.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).contiguous()
        return linear(rows, self._weight).view(*x.shape[:-1], self.out_features)

    @property
    def _weight(self) -> LinearWeight:
        if self.packed is None:
            raise RuntimeError("this layer has no weight yet; load_state_dict brings it")
        return self.packed


class QuantizedEmbedding(QuantizedModule):
    """Rows of a table of integers, two of 4 bits in a byte: row = scale * integers + offset, of each group."""

    def __init__(self, shape: tuple[int, int], how: Quantization, dtype: torch.dtype, device: str) -> None:
        super().__init__(shape, how, dtype, device)
        self.num_embeddings, self.embedding_dim = shape
        self.values = self.scale = self.offset = None

    def take(self, weight: Tensor | Integers, bias: Tensor | None = None) -> None:
        weight = self._checked(weight)
        if isinstance(weight, Integers) and serves(weight, self.how):
            values, self.scale, self.offset = weight.values, weight.scale, weight.offset
        else:
            floats = weight.dequantize().to(self.compute_dtype) if isinstance(weight, Integers) else weight
            values, self.scale, self.offset = quantize(floats, self.how)
        self.values = _in_bytes(values) if self.how.bits == 4 else values

    @property
    def weight(self) -> Tensor:
        """[rows, width]: what is looked up in, made anew each time; for code that looks at it."""
        return self.forward(torch.arange(self.num_embeddings, device=self.device))

    def forward(self, ids: Tensor) -> Tensor:
        if self.values is None or self.scale is None:
            raise RuntimeError("this layer has no weight yet; load_state_dict brings it")
        flat = ids.reshape(-1)
        values = self.values[flat]
        integers = _of_bytes(values)[:, : self.embedding_dim] if self.how.bits == 4 else values
        offset = None if self.offset is None else self.offset[flat]
        rows = Integers(self.how.bits, integers, self.scale[flat], offset).dequantize()
        return rows.to(self.compute_dtype).view(*ids.shape, self.embedding_dim)


def linears_of(model: nn.Module) -> list[str]:
    """The names of the layers that can become a QuantizedLinear."""
    return [name for name, module in model.named_modules() if type(module) is nn.Linear or _is_turned(module)]


def embeddings_of(model: nn.Module) -> list[str]:
    """The names of the layers that can become a QuantizedEmbedding."""
    return [name for name, module in model.named_modules() if type(module) is nn.Embedding and module.max_norm is None]


def forms_of(model: nn.Module, schemes: Mapping[str, Scheme]) -> dict[str, Quantization]:
    """How each layer is quantized. Raises ValueError naming one that cannot be cut into its groups."""
    forms: dict[str, Quantization] = {}
    for name, scheme in schemes.items():
        try:
            forms[name] = scheme.of(_shape(model.get_submodule(name))[1])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return forms


def quantize_modules(
    model: nn.Module,
    forms: Mapping[str, Quantization],
    *,
    dtype: torch.dtype,
    device: str,
    checkpoint: Checkpoint | None = None,
) -> set[str]:
    """Replaces layers of a model in place, one after the other, so that the floats of one are freed before the next.

    checkpoint: whose weights they get, which is read a parameter at a time; default: those that they have. Returns the
    parameters that were read. Raises CheckpointError naming one that it lacks, or that has another shape.
    """
    read: set[str] = set()
    present = checkpoint.names() if checkpoint else set()
    tied = _names_by_parameter(model)
    for name, how in forms.items():
        module = model.get_submodule(name)
        shape, turned = _shape(module), _is_turned(module)
        if isinstance(module, nn.Embedding):
            made = QuantizedEmbedding(shape, how, dtype, device)
        else:
            made = QuantizedLinear(shape, how, dtype, device, turned=turned)
        bias = getattr(module, "bias", None)
        if checkpoint is None:
            made.take(module.get_parameter("weight"), bias)
        else:
            found = [one for one in (f"{name}.weight", *tied[f"{name}.weight"]) if one in present]
            stored = found[0] if found else f"{name}.weight"
            wanted = {stored, *(() if bias is None else (f"{name}.bias",))}
            if lacking := wanted - present:
                raise CheckpointError(f"the checkpoint's parameters do not fit the model: 1 missing ({min(lacking)})")
            weight = checkpoint.integers(stored) or checkpoint.tensor(stored)
            try:
                made.take(weight, None if bias is None else checkpoint.tensor(f"{name}.bias"))
            except ValueError as error:
                raise CheckpointError(f"{stored}{place_of(checkpoint, stored)}: {error}") from error
            read |= wanted
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, made)
    return read


def _names_by_parameter(model: nn.Module) -> dict[str, list[str]]:
    """Of each parameter the names of all that are the same one, such as a tied embedding's."""
    names: dict[int, list[str]] = {}
    every = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in every.items():
        names.setdefault(id(parameter), []).append(name)
    return {name: names[id(parameter)] for name, parameter in every.items()}


def _is_turned(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _shape(module: nn.Module) -> tuple[int, int]:
    """[out, in]."""
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if _is_turned(module) else (rows, columns)


def _in_bytes(integers: Tensor) -> Tensor:
    """int8 [rows, width] of 4 bits -> uint8 [rows, ceil(width / 2)], the first of two in the lower half."""
    pairs = functional.pad(integers, (0, integers.shape[1] % 2)).add(8).to(torch.uint8).unflatten(1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def _of_bytes(packed: Tensor) -> Tensor:
    """int8 [rows, 2 * bytes] of uint8 [rows, bytes]."""
    return (torch.stack([packed & 15, packed >> 4], 2).flatten(1).to(torch.int8)) - 8
