"""GGUF files: the numbers that transformers reads, and the integers that stand for them."""

import json
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, RopeScalingType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kernels.quantization import Quantization
from shared.checkpoint import CheckpointError, GgufCheckpoint, open_checkpoint
from shared.gguf_header import GgufError, read_gguf_header
from shared.model_convert import ConversionError, convert_gguf, convert_tokenizer
from shared.model_files import ModelFiles, Weights
from shared.models.architecture import Rope
from shared.models.loading import load_weights
from shared.models.quantization import QuantizationPlan
from shared.models.rope import inverse_frequencies
from shared.policies.table import architecture_of
from tests.tiny_models import gguf_state_dict, tiny_gguf, tiny_model, tiny_tokenizer, write_gguf


def test_gguf_equals_transformers() -> None:
    path = tiny_gguf()
    theirs = gguf_state_dict(path, AutoModelForCausalLM.from_pretrained(tiny_model("llama")))
    ours = GgufCheckpoint(path)
    assert ours.names() == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours.tensor(name), value), name
    original = load_file(tiny_model("llama") / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.allclose(ours.tensor(name), original[name], atol=0.01), "Q8_0 is near, so rows are in their places"


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q4_1", 4), ("Q8_0", 8)])
def test_integers_of_gguf_stand_for_its_numbers(kind: str, bits: int, tmp_path: Path) -> None:
    path = tmp_path / "quantized.gguf"
    write_gguf(path, "llama", matrices=GGMLQuantizationType[kind])
    checkpoint = GgufCheckpoint(path)
    matrices = [name for name in checkpoint.names() if checkpoint.tensor(name).dim() == 2]
    assert len(matrices) > 14
    for name in matrices:
        integers = checkpoint.integers(name)
        assert integers is not None
        assert integers.bits == bits
        values = integers.values.double().unflatten(1, (-1, 32)) * integers.scale[:, :, None]
        if integers.offset is not None:
            values += integers.offset[:, :, None]
        torch.testing.assert_close(values.flatten(1).float(), checkpoint.tensor(name), rtol=0, atol=1e-7)
    assert checkpoint.integers("model.norm.weight") is None


def test_a_quantized_model_takes_the_integers_of_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = folder / "quantized.gguf"
    write_gguf(path, "llama", matrices=GGMLQuantizationType.Q4_1)
    convert_gguf(path, folder)
    files = ModelFiles("x", folder, Weights("gguf", (path,)), "")
    checkpoint, architecture = GgufCheckpoint(path), architecture_of(files.config)
    weights = load_weights(
        architecture, checkpoint, dtype=torch.bfloat16, device="cpu", quantization=QuantizationPlan.of_mode("int4")
    )
    for index, layer in enumerate(weights.layers):
        parts = [checkpoint.tensor(f"model.layers.{index}.self_attn.{name}_proj.weight") for name in "qkv"]
        torch.testing.assert_close(layer.qkv.dequantize(), torch.cat(parts), rtol=0, atol=1e-7)
    int8 = load_weights(
        architecture, checkpoint, dtype=torch.bfloat16, device="cpu", quantization=QuantizationPlan.of_mode("int8")
    )
    assert int8.layers[0].qkv.quantization == Quantization(8), "4 bits are not 8: quantized anew"


def test_damaged_gguf(tmp_path: Path) -> None:
    whole = tiny_gguf().read_bytes()
    damaged = tmp_path / "damaged.gguf"
    for size in (0, 3, 30, 2000):
        damaged.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"damaged\.gguf"):
            open_checkpoint(ModelFiles("x", tmp_path, Weights("gguf", (damaged,)), ""))
    damaged.write_bytes(whole[:-2000])
    checkpoint = GgufCheckpoint(damaged)
    with pytest.raises(CheckpointError, match="beyond the end of the GGUF file"):
        [checkpoint.tensor(name) for name in checkpoint.names()]
    damaged.write_bytes(b"GGUF\x07" + whole[5:])
    with pytest.raises(GgufError, match="version 7"):
        read_gguf_header(damaged)


def test_gguf_conversion(tmp_path: Path) -> None:
    convert_gguf(tiny_gguf(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    original = json.loads((tiny_model("llama") / "config.json").read_text())
    for field in ("hidden_size", "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "model_type"):
        assert config[field] == original[field], field
    assert config["rms_norm_eps"] == pytest.approx(original["rms_norm_eps"])
    converted = AutoTokenizer.from_pretrained(tmp_path)
    text = "The quick brown 狐狸 🙂 jumps <|im_end|>"
    assert converted.encode(text) == tiny_tokenizer().encode(text)
    turns = [{"role": "user", "content": "hello"}]
    assert converted.apply_chat_template(turns, tokenize=False) == tiny_tokenizer().apply_chat_template(
        turns, tokenize=False
    )


def test_slow_tokenizer_conversion(tmp_path: Path) -> None:
    vocabulary = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "vocab.json").write_text(json.dumps(vocabulary["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in vocabulary["merges"])
    (tmp_path / "slow" / "merges.txt").write_text("#version: 0.2\n" + merges + "\n")
    settings = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    (tmp_path / "slow" / "tokenizer_config.json").write_text(json.dumps(settings))
    out = tmp_path / "out"
    out.mkdir()
    convert_tokenizer(tmp_path / "slow", out)
    text = "The quick brown 狐狸 🙂 jumps"
    assert AutoTokenizer.from_pretrained(out).encode(text) == tiny_tokenizer().encode(text)


@pytest.mark.parametrize("divisors_are_llama3", [True, False])
def test_gguf_rope_scaling_is_carried_over_or_refused(tmp_path: Path, divisors_are_llama3: bool) -> None:
    """transformers drops rope_freqs.weight, and computes another model than the file holds."""
    path = tmp_path / "scaled.gguf"
    kind = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0}
    write_scaled_gguf(path, divisors_are_llama3=divisors_are_llama3)
    if not divisors_are_llama3:
        with pytest.raises(ConversionError, match=r"rope_freqs\.weight that are not llama3's"):
            convert_gguf(path, tmp_path)
        return
    convert_gguf(path, tmp_path)
    rope = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    assert rope == {
        **kind,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in GgufCheckpoint(path).names()


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (RopeScalingType.LINEAR, {"rope_type": "linear", "factor": 4.0}),
        (RopeScalingType.YARN, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}),
        (RopeScalingType.LONGROPE, None),
    ],
)
def test_gguf_named_rope_scaling(tmp_path: Path, scaling: RopeScalingType, expected: dict[str, object] | None) -> None:
    path = tmp_path / "scaled.gguf"
    write_gguf(path, "llama", rope_scaling=(scaling, 4.0, 512))
    if expected is None:
        with pytest.raises(ConversionError, match="scales rope by 'longrope'"):
            convert_gguf(path, tmp_path)
        return
    convert_gguf(path, tmp_path)
    rope = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    assert rope == {**expected, "rope_theta": 10_000.0}


def write_scaled_gguf(path: Path, *, divisors_are_llama3: bool) -> None:
    scaled = Rope(500_000.0, 16, "llama3", factor=8.0, original_context=8192)
    divisors = inverse_frequencies(Rope(500_000.0, 16)) / inverse_frequencies(scaled)
    if not divisors_are_llama3:
        divisors[2] *= 1.5
    write_gguf(path, "llama", rope_theta=500_000.0, extra={"rope_freqs.weight": divisors.numpy()})


def test_gguf_of_other_architectures_is_refused(tmp_path: Path) -> None:
    """Their names are those of a llama, and their weights are not what the names say."""
    data = tiny_gguf().read_bytes()
    path = tmp_path / "gemma.gguf"
    # the name of the architecture begins each of its keys too
    path.write_bytes(data.replace(b"llama", b"gemma"))
    with pytest.raises(CheckpointError, match="is a GGUF file of gemma, and read are those of llama, qwen2, qwen3"):
        GgufCheckpoint(path)
