"""Makes the small files of a model that lacks them: config and tokenizer of a GGUF file, tokenizer.json of a slow
tokenizer.

The one place where transformers is imported outside the tests. It loads torch and takes seconds, so the model store
runs it once per model in a process of its own: `python -m shared.model_convert gguf FILE OUT | tokenizer FOLDER OUT`.
"""

import json
import math
import sys
from pathlib import Path

from shared.gguf_header import GgufHeader, read_gguf_header


class ConversionError(Exception):
    """The model holds something that cannot be carried over without changing what it computes."""


def convert_gguf(gguf: Path, out: Path) -> None:
    """Writes config.json, generation_config.json, tokenizer.json and tokenizer_config.json into `out`."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    header = read_gguf_header(gguf)
    config = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    config.save_pretrained(out)
    _amend(out / "config.json", _rope_scaling(gguf, header))
    GenerationConfig.from_model_config(config).save_pretrained(out)
    _amend(out / "generation_config.json", _end_tokens(header))
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.save_pretrained(out, save_jinja_files=False)


def convert_tokenizer(folder: Path, out: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json into `out`, made from sentencepiece or vocabulary files."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), use_fast=True)
    if not tokenizer.is_fast:
        raise ConversionError(f"the tokenizer of {folder} ({type(tokenizer).__name__}) has no fast form")
    tokenizer.save_pretrained(out, save_jinja_files=False)


def _amend(path: Path, changes: dict[str, object]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _end_tokens(header: GgufHeader) -> dict[str, object]:
    """Chat models end a turn with another token than a text; GGUF keeps both, generation_config.json wants a list."""
    ids = [header.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    known = sorted({token_id for token_id in ids if isinstance(token_id, int)})
    return {"eos_token_id": known} if len(known) > 1 else {}


def _rope_scaling(gguf: Path, header: GgufHeader) -> dict[str, object]:
    """The rope scaling, which transformers' GGUF reader drops for these families."""
    prefix = f"{header.metadata.get('general.architecture')}.rope."
    values = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    if "rope_freqs.weight" in header.tensors:
        return {"rope_parameters": _llama3_parameters(gguf, header, float(str(values.get("freq_base", 10000.0))))}
    kind = values.get("scaling.type", "none")
    factor = values.get("scaling.factor", values.get("scale_linear"))
    if kind == "none" or factor is None:
        return {}
    if kind == "linear":
        return {"rope_parameters": {"rope_type": "linear", "factor": factor}}
    if kind != "yarn":
        raise ConversionError(f"{gguf} scales rope by {kind!r}; linear, yarn and llama3 are supported")
    original = {"original_max_position_embeddings": values.get("scaling.original_context_length")}
    return {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": factor,
            **{key: value for key, value in original.items() if value is not None},
        }
    }


def _llama3_parameters(gguf: Path, header: GgufHeader, theta: float) -> dict[str, object]:
    """llama3 scaling, which GGUF keeps only as one divisor per frequency: recovered, then checked against them.

    The largest divisor is the factor; the other constants are the ones every published llama3 model has.
    """
    import numpy as np

    tensor = header.tensors["rope_freqs.weight"]
    with gguf.open("rb") as file:
        file.seek(tensor.offset)
        divisors = np.frombuffer(file.read(4 * tensor.num_elements), dtype="<f4").astype(np.float64)
    factor, low, high, original = float(divisors.max()), 1.0, 4.0, 8192
    frequencies = theta ** (-np.arange(divisors.size) / divisors.size)
    smooth = (original * frequencies / (2 * math.pi) - low) / (high - low)
    expected = 1.0 / np.clip((1 - smooth) / factor + smooth, 1 / factor, 1.0)
    if not np.allclose(divisors, expected, rtol=1e-3):
        raise ConversionError(f"{gguf} has rope_freqs.weight that are not llama3's; use the model's safetensors")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


if __name__ == "__main__":
    what, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    try:
        {"gguf": convert_gguf, "tokenizer": convert_tokenizer}[what](source, target)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
