"""One file, then the environment, then flags; whatever is wrong is refused by its name."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from shared.config import ConfigError, TandemConfig, load_config


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder and no TANDEM_ variable."""
    for name in list(os.environ):
        if name.startswith("TANDEM_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_defaults_need_no_file():
    config = load_config()
    assert type(config) is TandemConfig
    assert config.model == "smollm2-135m-instruct"
    assert (config.gateway.port, config.gateway.http_port, config.prefill.port, config.decode.port) == (
        50051,
        8080,
        50061,
        50071,
    )


def test_flags_win_over_environment_over_file(clean: Path, monkeypatch: pytest.MonkeyPatch):
    (clean / "tandem.yaml").write_text("decode: {max_running: 1, max_waiting: 1, chunk_tokens: 1}\n")
    monkeypatch.setenv("TANDEM_DECODE__MAX_WAITING", "2")
    monkeypatch.setenv("TANDEM_DECODE__CHUNK_TOKENS", "2")
    decode = load_config(overrides={"decode": {"chunk_tokens": 3}}).decode
    assert (decode.max_running, decode.max_waiting, decode.chunk_tokens) == (1, 2, 3)


def test_a_named_file_is_read_and_has_to_be_there(clean: Path):
    path = clean / "other.yaml"
    with pytest.raises(ConfigError, match=r"other\.yaml: no such file"):
        load_config(path)
    path.write_text("block_tokens: 32\n")
    assert load_config(path).block_tokens == 32
    path.write_text("")
    assert load_config(path) == load_config()


def test_a_broken_file_is_named(clean: Path):
    path = clean / "tandem.yaml"
    path.write_text("model: [")
    with pytest.raises(ConfigError, match=r"tandem\.yaml"):
        load_config()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"decod": {}}, "decod: unknown key"),
        ({"decode": {"max_runing": 1}}, "decode.max_runing: unknown key"),
        ({"decode": {"max_running": 0}}, r"decode.max_running: .*greater than or equal to 1.*\(got 0\)"),
        ({"gateway": {"port": 70000}}, "gateway.port: "),
        ({"dtype": "float64"}, r"dtype: .*'bfloat16' or 'float16'.*\(got 'float64'\)"),
        ({"quantization": "int3"}, r"quantization: .*'int8', 'int8_dynamic', 'int4', 'fp8' or 'fp6'.*\(got 'int3'\)"),
        (
            {"quantization_exclude": "lm_head,*.down"},
            r"quantization_exclude: lm_head,\*\.down, and quantization is none: there is nothing to leave out",
        ),
        ({"block_tokens": 24}, "block_tokens: 24 is not a power of two"),
        ({"decode": {"block_tokens": 24}}, "decode.block_tokens: 24 is not a power of two"),
        ({"kv_dtype": "fp6"}, r"kv_dtype: .*'int8' or 'fp8'.*\(got 'fp6'\)"),
        ({"kv_dtype": "float32"}, "^kv_dtype: float32, and dtype is bfloat16: "),
        ({"kv_dtype": "float16"}, "^kv_dtype: float16, and dtype is bfloat16: "),
        (
            {"dtype": "float32", "prefill": {"kv_dtype": "bfloat16"}},
            "prefill.kv_dtype: bfloat16, and dtype is",
        ),
        ({"tp": 0}, r"tp: .*greater than or equal to 1.*\(got 0\)"),
        ({"decode": {"tp": 65}}, r"decode.tp: .*less than or equal to 64"),
        (
            {"prefill": {"tp": 2}, "device": "cuda", "transport": {"cuda_export": "handle"}},
            r"^transport.cuda_export: handle, and prefill.tp is 2: ranks map their pools by descriptor",
        ),
        ({"prefill": {"chunk_tokens": 600}}, r"prefill.chunk_tokens: 600 exceeds prefill.batch_tokens \(512\)"),
        (
            {"decode": {"batch_tokens": 64}},
            r"decode.batch_tokens: 64 leaves no token to prompts beside decode.max_running \(64\) sequences",
        ),
        ({"gateway": {"decode_workers": []}}, "gateway.decode_workers: empty"),
        ({"gateway": {"decode_workers": ["a:1", "b"]}}, r"gateway.decode_workers.1: is not host:port.*\(got 'b'\)"),
        ({"gateway": {"prefill_workers": ["a:http"]}}, "gateway.prefill_workers.0: is not host:port"),
        ({"gateway": {"prefill_workers": ["a:0"]}}, "gateway.prefill_workers.0: is not host:port"),
        ({"gateway": {"prefill_workers": [":1"]}}, "gateway.prefill_workers.0: is not host:port"),
        ({"gateway": {"prefill_workers": ["::1:50061"]}}, r"gateway.prefill_workers.0: .*in brackets: \[::1\]:50071"),
        (
            {"transport": {"require": "shared_memory", "disable": ["shared_memory"]}},
            "transport.require: shared_memory is also in transport.disable",
        ),
    ],
)
def test_what_is_wrong_is_refused_by_name(overrides: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=overrides)


def test_a_role_has_the_common_blocks_unless_it_says_otherwise():
    overrides = {"kv_dtype": "int8", "block_tokens": 32, "decode": {"kv_dtype": "auto", "block_tokens": 64}}
    config = load_config(overrides=overrides)
    assert (config.kv_dtype_of(config.prefill), config.block_tokens_of(config.prefill)) == ("int8", 32)
    assert (config.kv_dtype_of(config.decode), config.block_tokens_of(config.decode)) == ("bfloat16", 64)
    for dtype in ("float32", "float16"):
        config = load_config(overrides={"dtype": dtype, "kv_dtype": dtype})
        assert (config.weights_dtype, config.kv_dtype_of(config.decode)) == (dtype, dtype)


def test_a_role_has_the_common_ranks_unless_it_says_otherwise():
    config = load_config(overrides={"tp": 2, "decode": {"tp": 1}})
    assert (config.tp_of(config.prefill), config.tp_of(config.decode)) == (2, 1)
    assert load_config(overrides={"tp": 2, "device": "cuda"}).tp == 2
    by_handle = {"transport": {"cuda_export": "handle"}}
    assert load_config(overrides={"tp": 1, "device": "cuda", **by_handle}).tp == 1
    assert load_config(overrides={"tp": 2, "device": "cpu", **by_handle}).tp == 2


def test_every_fault_is_told_at_once():
    with pytest.raises(ConfigError) as error:
        load_config(overrides={"model": 3, "decode": {"max_running": 0}, "x": 1})
    assert [line.partition(":")[0] for line in str(error.value).splitlines()] == ["model", "decode.max_running", "x"]


@pytest.mark.parametrize("text", ["a:1,b:2", " a:1 , b:2 ", "a:1,b:2,"])
def test_lists_are_written_with_commas(text: str, monkeypatch: pytest.MonkeyPatch):
    assert load_config(overrides={"gateway": {"prefill_workers": text}}).gateway.prefill_workers == ("a:1", "b:2")
    monkeypatch.setenv("TANDEM_GATEWAY__DECODE_WORKERS", text)
    assert load_config().gateway.decode_workers == ("a:1", "b:2")


def test_an_ipv6_address_of_a_worker_stands_in_brackets():
    config = load_config(overrides={"gateway": {"decode_workers": "[::1]:50071"}})
    assert config.gateway.decode_workers == ("[::1]:50071",)


def test_an_empty_list_is_written_as_nothing():
    assert load_config(overrides={"gateway": {"prefill_workers": ""}}).gateway.prefill_workers == ()


@pytest.mark.parametrize("text", ["x", "3"])
def test_a_section_that_is_no_section_is_refused(text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TANDEM_DECODE", text)
    with pytest.raises(ConfigError, match="decode"):
        load_config()


def test_it_is_frozen():
    config = load_config()
    with pytest.raises(ValidationError, match="frozen"):
        config.model = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.decode.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("org/Model-7B", "Model-7B"),
        ("/models/My-Model", "My-Model"),
        ("/models/tiny.Q4_1.gguf", "tiny.Q4_1"),
    ],
)
def test_clients_name_the_last_part_of_the_model(model: str, name: str):
    assert load_config(overrides={"model": model}).model_name == name
    assert load_config(overrides={"model": model, "served_name": "x"}).model_name == "x"


def test_every_key_is_described():
    def bare(section, prefix: str) -> list[str]:
        found = []
        for name, field in section.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                found += bare(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                found.append(prefix + name)
        return found

    assert bare(TandemConfig, "") == []
