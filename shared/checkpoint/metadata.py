"""JSON that says what a checkpoint holds, of a bounded size."""

import json
from pathlib import Path

from shared.checkpoint.contract import CheckpointError

# A line for each of 300,000 parameters.
MAX_BYTES = 64 << 20


def read_metadata(path: Path) -> dict[str, object]:
    """A JSON object from a file. CheckpointError if it is missing, too large or something else."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; {MAX_BYTES} at most are read")
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return parse_metadata(text, str(path))


def parse_metadata(text: bytes | str, what: str) -> dict[str, object]:
    """The JSON object of a text. CheckpointError that begins with `what` if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return value
