"""`./tandem` as a user runs it: in a shell, from any folder, against a real service."""

import asyncio
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from cli.process import StartError
from cli.up import check_ports
from shared.config import load_config
from tests.cluster import Cluster

ROOT = Path(__file__).resolve().parent.parent.parent
TANDEM = str(ROOT / "tandem")


def tandem(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TANDEM, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        stdin=subprocess.DEVNULL,
        **options,
    )


async def tandem_async(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Beside the running test, whose event loop the service's watchers need."""
    return await asyncio.to_thread(tandem, *arguments)


def test_help_loads_none_of_the_heavy_packages():
    heavy = {"torch", "transformers", "grpc", "pydantic", "matplotlib"}
    script = f"import sys, cli.__main__; print(*({heavy!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_help_names_every_command():
    text = tandem("--help").stdout
    for name in ("up", "gateway", "prefill-worker", "decode-worker", "generate", "chat", "model", "config", "bench"):
        assert name in text


def test_it_runs_from_any_folder_and_reads_its_tandem_yaml(tmp_path: Path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/__init__.py").write_text("raise SystemExit('the wrong folder')")
    (tmp_path / "tandem.yaml").write_text("block_tokens: 64\n")
    link = tmp_path / "link"
    link.symlink_to(TANDEM)
    done = subprocess.run([link, "config", "--json"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["block_tokens"] == 64


def test_config_prints_a_file_that_means_the_same(tmp_path: Path):
    done = tandem("config", "--set", "decode.max_running=3", "--set", "gateway.prefill_workers=a:1,b:2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "# sequences in one step at most\n  max_running: 3\n" in done.stdout
    path = tmp_path / "printed.yaml"
    path.write_text(done.stdout)
    overrides = {"decode": {"max_running": 3}, "gateway": {"prefill_workers": ["a:1", "b:2"]}}
    assert load_config(path) == load_config(overrides=overrides)


def test_config_hides_secrets(tmp_path: Path):
    for flags in ([], ["--json"]):
        done = tandem("config", "--set", "auth.cluster_key=swordfish", *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "swordfish" not in done.stdout
        assert yaml.safe_load(done.stdout)["auth"]["cluster_key"]


@pytest.mark.parametrize("command", ["config", "up", "decode-worker"])
def test_a_wrong_key_is_named_and_the_status_is_2(command: str, tmp_path: Path):
    done = tandem(command, "--set", "decode.max_runing=3", cwd=tmp_path)
    assert done.returncode == 2
    assert "decode.max_runing: unknown key" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_role_gets_its_flags():
    done = tandem("prefill-worker", "--help")
    assert done.returncode == 0
    assert "--die-with-parent" in done.stdout


def test_a_taken_port_is_named_before_anything_starts():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(StartError, match=rf"decode\.port: 127\.0\.0\.1:{port} cannot be used"):
            check_ports(load_config(overrides={"gateway": {"port": 0, "http_port": 0}, "decode": {"port": port}}))
        done = tandem("up", "--port", "0", "--http-port", str(port))
    assert done.returncode == 1
    assert f"gateway.http_port: 127.0.0.1:{port} cannot be used" in done.stderr


def test_a_port_wanted_twice_is_named():
    config = load_config(overrides={"prefill": {"port": 50070}, "up": {"prefill": 2}})
    with pytest.raises(StartError, match=r"port 50071 is wanted twice, by prefill\.port and decode\.port"):
        check_ports(config)


def test_models_are_pulled_listed_shown_and_removed(tmp_path: Path, tiny_model: Callable[[str], Path]):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}

    def model(*arguments: str) -> subprocess.CompletedProcess[str]:
        return tandem("model", *arguments, env=env)

    assert "no model is here" in model("list").stdout
    done = model("pull", str(tiny_model("llama")), "--name", "tiny")
    assert done.returncode == 0, done.stderr
    (listed,) = json.loads(model("list", "--json").stdout)
    assert listed["name"] == "tiny"
    assert "tiny" in model("list").stdout
    assert listed == json.loads(model("show", "tiny", "--json").stdout)
    assert listed["digest"] in model("show", "tiny").stdout
    assert model("remove", "tiny").stdout.startswith("removed tiny")
    gone = model("show", "tiny")
    assert gone.returncode == 1
    assert "tiny" in gone.stderr
    assert "Traceback" not in gone.stderr


async def test_generate_prints_the_text_and_the_timing(cluster: Cluster):
    flags = ("--address", cluster.grpc_target, "--temperature", "0", "--max-tokens", "8")
    plain = await tandem_async("generate", "The capital of France is", *flags)
    assert plain.returncode == 0, plain.stderr
    assert "Paris" in plain.stdout
    assert "8 tokens, the first after" in plain.stderr
    chunks = await tandem_async("generate", "The capital of France is", *flags, "--json", "--quiet")
    lines = [json.loads(line) for line in chunks.stdout.splitlines()]
    texts = [output.get("text", "") for line in lines for output in line.get("outputs", ())]
    assert "".join(texts) + "\n" == plain.stdout
    assert lines[-1]["usage"]["completion_tokens"] == 8
    assert chunks.stderr == ""


async def test_generate_prints_several_outputs_apart(cluster: Cluster):
    done = await tandem_async("generate", "Once", "-n", "3", "--max-tokens", "4", "--address", cluster.grpc_target)
    assert [f"[{i}]" in done.stdout for i in range(3)] == [True, True, True]


async def test_generate_tells_what_is_wrong(cluster: Cluster):
    wrong = await tandem_async("generate", "x", "--top-p", "3", "--address", cluster.grpc_target)
    assert wrong.returncode == 1
    assert "INVALID_ARGUMENT: sampling.top_p" in wrong.stderr
    nobody = await tandem_async("generate", "x", "--address", "127.0.0.1:1")
    assert nobody.returncode == 1
    assert "no answer at 127.0.0.1:1" in nobody.stderr
    assert "./tandem up" in nobody.stderr


async def test_ctrl_c_ends_generate_and_the_request(cluster: Cluster):
    process = await asyncio.create_subprocess_exec(
        TANDEM,
        *("generate", "Count: 1 2 3", "--max-tokens", "2000", "--address", cluster.grpc_target),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout
    await process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    await process.communicate()
    assert process.returncode == 130
    await cluster.settled()


async def test_the_example_client_streams(cluster: Cluster):
    def example(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "examples/client.py"), "--address", cluster.grpc_target, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    done = await asyncio.to_thread(example, "--temperature", "0", "--max-tokens", "8", "The capital of France is")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "8 generated" in done.stderr
    wrong = await asyncio.to_thread(example, "--temperature", "-1", "x")
    assert wrong.returncode == 1
    assert "INVALID_ARGUMENT" in wrong.stderr
    assert "BadRequest" in wrong.stderr


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *command: str) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execv(command[0], command)
        self._seen = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def until(self, text: str, timeout_s: float = 60) -> str:
        """All that was shown up to and with `text`."""
        end = time.monotonic() + timeout_s
        while text not in self._seen:
            assert time.monotonic() < end, f"no {text!r} in {self._seen!r}"
            if select.select([self._fd], [], [], 0.5)[0]:
                self._seen += os.read(self._fd, 4096).decode(errors="replace")
        shown, _, self._seen = self._seen.partition(text)
        return shown + text

    def until_prompt(self) -> None:
        """The prompt is there and takes keys one by one.

        Before that a Ctrl-C may wait for the next key, and what is typed is echoed twice, by the terminal and readline.
        """
        self.until("> ")
        end = time.monotonic() + 60
        while termios.tcgetattr(self._fd)[3] & termios.ICANON:
            assert time.monotonic() < end, "nothing reads the terminal"
            select.select([], [], [], 0.01)

    def end(self) -> int:
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._fd)
        return status


async def test_chat_remembers_and_ctrl_c_ends_only_the_answer(cluster: Cluster):
    def talk() -> int:
        terminal = Terminal(
            TANDEM, "chat", "--address", cluster.grpc_target, "--temperature", "0", "--max-tokens", "400"
        )
        terminal.until_prompt()
        terminal.type("Say the word banana.\r")
        terminal.until("tokens/s")
        terminal.until_prompt()
        terminal.type("Write a very long story about a dog.\r")
        terminal.until("story about a dog.")
        terminal.until("dog")  # the answer has begun
        terminal.type("\x03")
        terminal.until("ended")
        terminal.until_prompt()
        terminal.type("\x03")
        terminal.until("leaves")
        terminal.type("/clear\r")
        terminal.until_prompt()
        terminal.type("Hello!\r")
        terminal.until("tokens/s")
        terminal.until_prompt()
        terminal.type("/exit\r")
        return terminal.end()

    assert await asyncio.to_thread(talk) == 0
    await cluster.settled()
