"""What a model is on disk: a folder of small files, and weight files of one kind."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

WeightKind = Literal["safetensors", "gguf", "pickle"]

# Everything but weights that a model folder may hold and that Tandem, or the conversion of a tokenizer, reads.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    # of an embedding model: what becomes of its hidden states
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)

# Fields of config.json that say who wrote it and from where, not what the model computes.
_VOLATILE_CONFIG = ("_name_or_path", "_model_name_or_path", "transformers_version", "architectures", "torch_dtype")


class ModelError(Exception):
    """A model cannot be found, fetched or used; the message names the cause and the fix."""


class ModelNotFoundError(ModelError):
    """No such model in the store, nor on the path given."""


@dataclass(frozen=True)
class Weights:
    """The weight files, all of one kind, in a fixed order."""

    kind: WeightKind
    paths: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)


@dataclass(frozen=True)
class ModelFiles:
    """A model ready to be loaded.

    `folder` holds config.json, tokenizer.json, tokenizer_config.json (with the chat template, if there is one that is
    not in chat_template.jinja) and, where the model has one, generation_config.json. `digest` is the hex sha256 of
    config and weights; it is the same for the same model in another place.
    """

    name: str
    folder: Path
    weights: Weights
    digest: str

    @property
    def config(self) -> dict[str, object]:
        """config.json, parsed anew at each call."""
        return read_json(self.folder / "config.json")

    def digest_as(self, form: str) -> str:
        """The digest of what is computed with: quantized weights are other weights, and their KV is other KV.

        form: of the weights, as TandemConfig.weights_form says it.
        """
        if form == "none":
            return self.digest
        return hashlib.sha256(f"{self.digest} {form}".encode()).hexdigest()


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file; ModelError if it is missing or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value


def find_weights(folder: Path, *, allow_pickle: bool = False) -> Weights:
    """The weight files of a folder: safetensors before GGUF before pickle.

    Raises ModelError if there are none, if an index names a shard that is missing, if there are several GGUF files to
    choose from, or if there is only pickle and `allow_pickle` is not set.
    """
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).exists():
            kind: WeightKind = "safetensors" if "safetensors" in index else "pickle"
            return _checked(folder, Weights(kind, _shards(folder, index)), allow_pickle)
    safetensors = [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith("consolidated")]
    if safetensors:
        whole = folder / "model.safetensors"
        return Weights("safetensors", (whole,) if whole in safetensors else tuple(safetensors))
    gguf = sorted(folder.glob("*.gguf"))
    if len(gguf) > 1:
        raise ModelError(f"{folder} holds {len(gguf)} GGUF files; give the path of one: {gguf[0]}")
    if gguf:
        return Weights("gguf", (gguf[0],))
    pickles = sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles:
        return _checked(folder, Weights("pickle", tuple(pickles)), allow_pickle)
    raise ModelError(f"{folder} holds no weights (*.safetensors, *.gguf)")


def _shards(folder: Path, index: str) -> tuple[Path, ...]:
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / index} has no weight_map")
    shards = sorted({str(shard) for shard in weight_map.values()})
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise ModelError(f"{folder / index} names a shard outside its folder: {outside[0]}")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing[:5])}")
    return tuple(folder / shard for shard in shards)


def _checked(folder: Path, weights: Weights, allow_pickle: bool) -> Weights:
    if weights.kind == "pickle" and not allow_pickle:
        raise ModelError(
            f"{folder} holds its weights as pickle ({weights.paths[0].name}), which can run code when loaded; "
            "convert them to safetensors, or pass --allow-pickle (to init_inference: checkpoint_config.allow_pickle) "
            "if you trust their source"
        )
    return weights


def model_digest(config: dict[str, object] | None, weight_hashes: list[str]) -> str:
    """Hex sha256 over the configuration and the weights, free of names, paths and the order of shards.

    `config` is None for GGUF: its configuration lies in the weight file, and the config.json made from it depends on
    the version of the converter.
    """
    meaningful = None if config is None else {key: config[key] for key in config if key not in _VOLATILE_CONFIG}
    canonical = {"config": meaningful, "weights": sorted(weight_hashes)}
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
