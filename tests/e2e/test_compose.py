"""compose.yaml's services, started as its containers would be and with exactly its words, serve."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kernels.cpu.library import build
from tests.compose import COMPOSE, CPU, load, overlay
from tests.containers import Containers, in_the_way
from tests.tiny_models import tiny_tokenizer

MAX_TOKENS = 24
PROMPT = "Paris is the capital of"
# what a user writes to .env; the rest is as the files say
VARIABLES = {
    "TANDEM_MODEL": "tiny",
    "TANDEM_MODEL_SOURCE": "/import",
    "TANDEM_DTYPE": "float32",
    "TANDEM_PREFILL_KV_MIB": "32",
    "TANDEM_DECODE_KV_MIB": "32",
    "TANDEM_AUTH__CLUSTER_KEY": "swordfish",
}
GENERATE = ["./tandem", "generate", PROMPT, "--temperature", "0", "--max-tokens", str(MAX_TOKENS), "--json"]
READ = "import urllib.request as r; print(r.urlopen('http://gateway:8080/metrics').read().decode())"
READ_METRICS = [".venv/bin/python", "-c", READ]

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of the volumes; the cache has the compiled ops, as one that was in use before."""
    reason = in_the_way()
    if reason:
        pytest.skip(f"this kernel lets us have no user, mount, network and PID namespaces: {reason}")
    compiled = tmp_path / "cache/tandem/kernels"
    compiled.mkdir(parents=True)
    shutil.copy(build(), compiled)
    return tmp_path


def project(model: Path) -> dict:
    """The files for a CPU host, and a model that lies on the host, as docs/operations.md says to take it."""
    mounted = {"services": {"model": {"volumes": [f"{model}:/import:ro"]}}}
    return overlay(load(COMPOSE, CPU, variables=VARIABLES), mounted)


def answer(done: tuple[int, str, str]) -> tuple[list[int], dict]:
    """Tokens, and the receipt."""
    status, output, errors = done
    assert status == 0, errors
    chunks = [json.loads(line) for line in output.splitlines()]
    tokens = [token for chunk in chunks for one in chunk.get("outputs", ()) for token in one.get("token_ids", ())]
    return tokens, chunks[-1]["receipt"]


def expected(model: Path, prompt_tokens: list[int]) -> list[int]:
    """The same from one process: transformers' own generate."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        sequences = reference.generate(
            torch.tensor([prompt_tokens]),
            attention_mask=torch.ones(1, len(prompt_tokens), dtype=torch.int64),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    return sequences[0, len(prompt_tokens) :].tolist()


@pytest.mark.slow
async def test_scaled_services_all_take_part(tiny_model: Callable[[str], Path], folder: Path) -> None:
    """`--scale prefill=2 --scale decode=2`: the gateway finds every container behind the two names."""
    model = tiny_model("llama")
    async with Containers(project(model), folder, scale={"prefill": 2, "decode": 2}) as containers:
        tokens, _ = answer(await containers.run("gateway-1", GENERATE))
        assert tokens == expected(model, tiny_tokenizer().encode(PROMPT))
        _, metrics, errors = await containers.run("gateway-1", READ_METRICS)
        alive = re.findall(r'^tandem_worker_up{role="(\w+)",worker="[^"]+"} 1.0$', metrics, re.MULTILINE)
        assert sorted(alive) == ["decode", "decode", "prefill", "prefill"], metrics + errors


async def test_the_services_serve(tiny_model: Callable[[str], Path], folder: Path) -> None:
    model = tiny_model("llama")
    async with Containers(project(model), folder) as containers:
        tokens, receipt = answer(await containers.run("gateway-1", GENERATE))
        assert tokens == expected(model, tiny_tokenizer().encode(PROMPT))
        # through the socket in the volume, from one PID namespace to another
        assert receipt["transport"] == "TRANSPORT_SHARED_MEMORY"
        assert int(receipt["handoff_bytes"]) > 0

        assert "libtorch" in mapped(containers.pid("decode-1"))
        assert "libtorch" not in mapped(containers.pid("gateway-1")), "the gateway has loaded torch"

        for name in ("prefill-1", "decode-1", "gateway-1"):
            status = await rights(containers, name)
            assert status["NoNewPrivs"] == "1"
            assert {status[key] for key in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
            assert status["Uid"].split()[0] == "1000"
            for path in ("/app/x", "/x", *(["/cache/x"] if name == "gateway-1" else [])):
                failed, _, errors = await containers.run(name, ["touch", path])
                assert failed
                assert "Read-only file system" in errors
        found, modes, _ = await containers.run("decode-1", ["stat", "--format=%a %u", "/run/tandem"])
        assert (found, modes) == (0, "700 1000\n")
    assert containers.statuses == {"model-1": 0, "prefill-1": 0, "decode-1": 0, "gateway-1": 0}


def mapped(pid: int) -> str:
    """The files that a process has mapped, its libraries among them."""
    return Path(f"/proc/{pid}/maps").read_text()


async def rights(containers: Containers, name: str) -> dict[str, str]:
    """Of a container's first process, as it sees itself."""
    _, text, _ = await containers.run(name, ["cat", "/proc/1/status"])
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
