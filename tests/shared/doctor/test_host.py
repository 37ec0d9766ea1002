"""Findings about a host: its CPU, its memory, the folder of sockets, the packages."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from kernels.cpu import library
from shared.doctor import host as checks
from shared.doctor import software
from shared.doctor.examination import attempt
from shared.doctor.finding import Finding, Level
from shared.doctor.socket_folder import socket_folder
from shared.doctor.surroundings import Surroundings
from shared.transport.descriptor_socket import LONGEST_PATH
from tests.shared.doctor.places import PLENTY, examine_under, host, level_of, the, write

Check = Callable[[Surroundings], Iterable[Finding]]
SMALL = "MemTotal: 1000000 kB\nMemAvailable: 60000000 kB\nCommitLimit: 1000000 kB\nCommitted_AS: 0 kB\n"
TAKEN = PLENTY.replace("MemAvailable: 60000000", "MemAvailable: 600000")
KERNELS = "Metadata-Version: 2.1\nName: kernels\nVersion: 0.4\n"

# A filter that lets every system call pass but memfd_create (319 on x86-64, 279 on arm64), which is refused with EPERM.
SECCOMP = """
import ctypes, platform, struct
number = {"x86_64": 319, "aarch64": 279}[platform.machine()]
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS"
assert libc.prctl(22, 2, program, 0, 0) == 0, f"PR_SET_SECCOMP: {ctypes.get_errno()}"
"""
ONE_CORE = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"


def opened_to_others(folder: Path) -> Path:
    folder.mkdir()
    folder.chmod(0o777)
    return folder


# kind -> (check, level, what the host is, a part of the message, a part of the remedy)
PROVOKED: dict[str, tuple[Check, Level, Callable[[Path], Surroundings], str, str]] = {
    "host too small": (
        checks.memory,
        "error",
        lambda p: host(p, files={"proc/meminfo": SMALL}),
        "the host has 977 MiB",
        "decode.kv_memory_mib",
    ),
    "host memory taken": (
        checks.memory,
        "warning",
        lambda p: host(p, files={"proc/meminfo": TAKEN}),
        "586 MiB of 62,500 MiB are free",
        "prefill.kv_memory_mib",
    ),
    "strict overcommit": (
        checks.overcommit,
        "warning",
        lambda p: host(p, files={"proc/meminfo": SMALL, "proc/sys/vm/overcommit_memory": "2\n"}),
        "977 MiB may still be promised",
        "sysctl -w vm.overcommit_memory=0",
    ),
    "socket path too long": (
        socket_folder,
        "warning",
        lambda p: host(p, f"transport.socket_dir={p / ('x' * 100)}"),
        f"the kernel takes {LONGEST_PATH}",
        "TANDEM_TRANSPORT__SOCKET_DIR: /run/tandem",
    ),
    "socket folder open to others": (
        socket_folder,
        "warning",
        lambda p: host(p, f"transport.socket_dir={opened_to_others(p / 's')}"),
        "who can remove the workers' sockets",
        "chmod go-w ",
    ),
    "socket folder not shared": (
        socket_folder,
        "warning",
        lambda p: host(
            p, f"transport.socket_dir={p / 's'}", "gateway.decode_workers=decode:50071", files={".dockerenv": ""}
        ),
        "is this container's own",
        "- sockets:/run/tandem",
    ),
    "kernels is installed": (
        software.foreign_kernels,
        "error",
        lambda p: host(p, import_path=[str(write(p / "site", {"kernels-0.4.dist-info/METADATA": KERNELS}))]),
        "the package `kernels` 0.4 is installed",
        "-m pip uninstall kernels",
    ),
    "check failed": (
        lambda surroundings: attempt(checks.memory, surroundings),
        "warning",
        lambda p: host(p, files={"proc/meminfo": "nothing\n"}),
        "it could not be looked at: ",
        "tandem doctor --json",
    ),
}


@pytest.mark.parametrize("kind", PROVOKED)
def test_each_finding_is_provoked(kind: str, tmp_path: Path) -> None:
    check, level, make, message, remedy = PROVOKED[kind]
    finding = the(check(make(tmp_path)), kind)
    assert finding.level == level
    assert message in finding.message
    assert remedy in finding.remedy


@pytest.fixture(scope="module")
def poor(tmp_path_factory: pytest.TempPathFactory) -> list[Finding]:
    """What a process finds that has one core, no compiler, no memory files, and a temporary folder open to others."""
    folder = tmp_path_factory.mktemp("poor")
    (folder / "empty").mkdir()
    opened_to_others(folder / f"tandem-{os.getuid()}")
    environment = {"PATH": str(folder / "empty"), "XDG_CACHE_HOME": str(folder / "cache"), "TMPDIR": str(folder)}
    script = f"{SECCOMP}\n{ONE_CORE}"
    return examine_under(script=script, assignments=["transport.socket_dir=" + str(folder)], environment=environment)


# kind -> (level, a part of the message, a part of the remedy), of `poor`
PROVOKED_TOGETHER: dict[str, tuple[Level, str, str]] = {
    "cpu ops not built": ("error", "gcc was not found on PATH", "install gcc"),
    "one core": ("warning", "take turns on it", "two cores or more"),
    "cores not shared": ("warning", "must be a folder that only its owner can write to", "TMPDIR"),
    "no memory files": ("error", "no worker starts: [Errno 1] Operation not permitted", "type: RuntimeDefault"),
    "no handoff": ("warning", "cannot be handed over", "- sockets:/run/tandem"),
}


@pytest.mark.parametrize("kind", PROVOKED_TOGETHER)
def test_each_finding_of_a_poor_process(kind: str, poor: list[Finding]) -> None:
    level, message, remedy = PROVOKED_TOGETHER[kind]
    finding = the(poor, kind)
    assert finding.level == level
    assert message in finding.message
    assert remedy in finding.remedy


PROVOKED_INSTRUCTIONS = "no vector instructions"


@pytest.mark.parametrize(
    ("instructions", "level", "text"),
    [
        ("portable C", "warning", "none of the vector instructions"),
        ("AVX2", "ok", "several times slower for prompts"),
        ("AVX-512", "ok", "several times slower for prompts"),
        ("AVX-512 BF16", "ok", "dot products of bfloat16 pairs"),
    ],
)
def test_each_set_of_instructions(
    instructions: str, level: str, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "instruction_set", lambda: instructions)
    [finding] = checks.cpu_ops(host(tmp_path))
    assert finding.level == level
    assert finding.message.startswith(f"{instructions}: ")
    assert text in finding.message
    assert finding.kind == (PROVOKED_INSTRUCTIONS if level == "warning" else "")
    assert bool(finding.remedy) == (level == "warning")


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder for sockets, whose paths the kernel takes 107 bytes of."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        yield Path(folder)


def test_a_host_with_nothing_amiss(short_path: Path) -> None:
    surroundings = host(short_path, f"transport.socket_dir={short_path / 'made' / 'anew'}")
    for check in (checks.memory, checks.overcommit, checks.memory_files, socket_folder, software.foreign_kernels):
        assert [finding.level for finding in attempt(check, surroundings)] == ["ok"]
    assert not (short_path / "made").exists(), "looking leaves nothing"


def test_a_handoff_that_is_required_is_an_error(short_path: Path) -> None:
    (short_path / "file").write_text("")
    surroundings = host(short_path, f"transport.socket_dir={short_path / 'file'}", "transport.require=shared_memory")
    finding = the(socket_folder(surroundings), "socket folder unusable")
    assert finding.level == "error"
    assert f"install -d -m 700 -o {os.geteuid()} {short_path / 'file'}" in finding.remedy
    disabled = (f"transport.socket_dir={short_path / 'file'}", "transport.disable=shared_memory")
    assert level_of(socket_folder(host(short_path / "b", *disabled, "device=cpu")), "socket folder") == "ok"
    on_gpu = socket_folder(host(short_path / "c", *disabled, "device=cuda"))
    assert the(on_gpu, "socket folder unusable").level == "warning", "pools on GPUs are passed there too"


def test_looking_at_the_shared_cores_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    [finding] = checks.shared_cores(host(tmp_path / "host"))
    assert finding.level == "ok"
    assert not (tmp_path / f"tandem-{os.getuid()}").exists()
