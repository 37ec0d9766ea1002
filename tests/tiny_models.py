"""Tiny random models of every family, made on the fly with a tokenizer, once per test process.

path = tiny_model("qwen3")       # a Hugging Face folder: config, safetensors, tokenizer, chat template
path = deep_model()              # one of many layers, of which each matrix is little
path = tiny_gguf()               # the "llama" one as a .gguf file
files = smollm2()                # the real default model, from the user's store (pulled if it is not there)
"""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.models.auto.configuration_auto import AutoConfig

from shared.model_files import ModelError, ModelFiles
from shared.model_store import ModelStore

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = (
    "The quick brown fox jumps over the lazy dog. def main(): return 0\n",
    "Paris is the capital of France, and Rome is the capital of Italy.\n",
    "你好，世界。 Emoji: 🙂🚀 — and a long dash.\n",
)
SIZES = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}
# What each kind has beside the sizes above; None takes a size away. All kinds of one family share its `model_type`.
_ONE_KV_HEAD_EACH: dict[str, object] = {"num_key_value_heads": None}
_GPT: dict[str, object] = {**_ONE_KV_HEAD_EACH, "intermediate_size": None, "initializer_range": 0.15}
KINDS: dict[str, dict[str, object]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-untied-biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-gelu": {"model_type": "llama", "hidden_act": "gelu_pytorch_tanh"},
    "llama-linear": {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "llama-llama3": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama-yarn": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    },
    "mistral": {"model_type": "mistral", "sliding_window": 24},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-sliding": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 1,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 56,
        "mlp_only_layers": [1],
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 24,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
    "gemma": {"model_type": "gemma", "head_dim": 24},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 24,
        "sliding_window": 20,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 24,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 100_000.0, "factor": 8.0},
        },
    },
    "phi": {"model_type": "phi"},
    "phi-qk-norm": {"model_type": "phi", "qk_layernorm": True},
    "phi3": {"model_type": "phi3", "sliding_window": 24},
    "phi3-longrope": {
        "model_type": "phi3",
        "original_max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 256,
            "short_factor": [1.0, 1.1, 1.5, 2.0],
            "long_factor": [4.0, 5.0, 6.0, 7.0],
        },
    },
    "gpt2": {"model_type": "gpt2", **_GPT},
    "gptj": {"model_type": "gptj", "rotary_dim": 8, **_GPT},
    "gpt_neo": {
        "model_type": "gpt_neo",
        **_GPT,
        "attention_types": [[["global", "local", "global"], 1]],
        "window_size": 20,
    },
    "gpt_neox": {"model_type": "gpt_neox", **_ONE_KV_HEAD_EACH, "rotary_pct": 0.5},
    "gpt_neox-sequential": {
        "model_type": "gpt_neox",
        **_ONE_KV_HEAD_EACH,
        "use_parallel_residual": False,
        "attention_bias": False,
    },
    "opt": {"model_type": "opt", **_GPT, "ffn_dim": 96, "init_std": 0.15, "word_embed_proj_dim": 64},
    "opt-post-norm": {
        "model_type": "opt",
        **_GPT,
        "ffn_dim": 96,
        "init_std": 0.15,
        "do_layer_norm_before": False,
        "word_embed_proj_dim": 48,
    },
    "bloom": {"model_type": "bloom", **_GPT, "hidden_size": 96, "num_attention_heads": 6},
    "bloom-normed-residual": {"model_type": "bloom", **_GPT, "apply_residual_connection_post_layernorm": True},
    "falcon": {"model_type": "falcon", **_GPT, "ffn_hidden_size": 96},
    "falcon-new": {
        "model_type": "falcon",
        **_GPT,
        "ffn_hidden_size": 96,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
    "falcon-alibi": {
        "model_type": "falcon",
        **_GPT,
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
    "mpt": {"model_type": "mpt", **_GPT, "attn_config": {"clip_qkv": 1.5}},
    "stablelm": {"model_type": "stablelm"},
    "stablelm-parallel": {
        "model_type": "stablelm",
        "use_parallel_residual": True,
        "qk_layernorm": True,
        "use_qkv_bias": True,
    },
    "olmo2": {"model_type": "olmo2"},
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.6,
        "logits_scaling": 0.4,
    },
}


@functools.cache
def models_root() -> Path:
    """Where the models of this process lie."""
    root = Path(tempfile.mkdtemp(prefix="tandem-tiny-models-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@functools.cache
def tiny_model(kind: str = "llama", *, seed: int = 0) -> Path:
    """A folder with a random model of KINDS, the same weights for the same seed."""
    folder = models_root() / f"tiny-{kind}-{seed}"
    fields = {name: value for name, value in {**SIZES, **KINDS[kind]}.items() if value is not None}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            # Fresh norms are 1 and fresh biases 0: nothing would show that they are read.
            if parameter.ndim == 1:
                low, high = (-0.5, 0.5) if name.endswith("bias") else (0.5, 1.5)
                torch.nn.init.uniform_(parameter, low, high)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder, save_jinja_files=False)
    return folder


@functools.cache
def deep_model() -> Path:
    """Of so many layers that one matrix is little beside them all; bfloat16."""
    folder = models_root() / "deep"
    config = AutoConfig.for_model(
        "llama",
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=40,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 384 tokens: any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


@functools.cache
def tiny_gguf(kind: str = "llama") -> Path:
    """A llama kind as a .gguf file."""
    path = models_root() / f"tiny-{kind}.gguf"
    write_gguf(path, kind)
    return path


def write_gguf(
    path: Path,
    kind: str,
    *,
    rope_theta: float = 10_000.0,
    rope_scaling: tuple[gguf.RopeScalingType, float, int] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    matrices: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0,
) -> None:
    """A llama kind as llama.cpp's converter writes it: q and k rows permuted.

    `rope_scaling`: type, factor and original context. `extra`: further tensors.
    """
    model = AutoModelForCausalLM.from_pretrained(tiny_model(kind), dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if rope_scaling:
        writer.add_rope_scaling_type(rope_scaling[0])
        writer.add_rope_scaling_factor(rope_scaling[1])
        writer.add_rope_scaling_orig_ctx_len(rope_scaling[2])
    _add_tokenizer(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = parameter.numpy()
        for projection, num_heads in heads.items():
            if projection in name:
                pairs = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
                values = pairs.swapaxes(1, 2).reshape(values.shape)
        stored_as = matrices if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None
        writer.add_tensor(gguf_name, gguf.quantize(np.ascontiguousarray(values), stored_as), raw_dtype=stored_as)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token in SPECIAL_TOKENS else normal for token in tokens])
    writer.add_token_merges(_merges(tokenizer))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _merges(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return [" ".join(pair) for pair in merges]


def gguf_state_dict(path: Path, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What transformers reads from a GGUF file for a model of its own, in float32."""
    # it makes the same table of names anew for each part of a model, which is most of its time
    with mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)):
        return load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]


@functools.cache
def smollm2() -> ModelFiles:
    """The default model. A test that needs it is skipped where it is neither cached nor can be fetched."""
    try:
        return ModelStore().pull("smollm2-135m-instruct")
    except ModelError as error:
        pytest.skip(f"smollm2-135m-instruct is not here and cannot be fetched: {error}")


@functools.cache
def smollm2_reference() -> PreTrainedModel:
    """The default model as transformers reads its file, in float32."""
    files = smollm2()
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(files.folder), dtype=torch.float32)
    model.load_state_dict(gguf_state_dict(files.weights.paths[0], model), strict=False)
    model.tie_weights()
    return model.eval()
