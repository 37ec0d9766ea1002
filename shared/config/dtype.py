"""The names that a dtype goes by."""

from typing import Any

_NAMES = {
    "float16": ("float16", "fp16", "half", "torch.float16", "torch.half"),
    "bfloat16": ("bfloat16", "bf16", "bfloat", "torch.bfloat16"),
    "float32": ("float32", "fp32", "float", "torch.float32", "torch.float"),
    "int8": ("int8", "torch.int8"),
}
_BY_NAME = {name: dtype for dtype, names in _NAMES.items() for name in names}


def dtype_name(value: Any, *others: str) -> str:
    """float16, bfloat16, float32 or int8, of any name of theirs or of the torch.dtype; or one of `others`.

    Raises ValueError.
    """
    name = value if value in others else _BY_NAME.get(str(value))
    if name is None:
        raise ValueError(f"'{value}' is not a valid dtype: {', '.join((*_NAMES, *others))} are")
    return name
