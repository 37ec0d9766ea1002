"""Findings about a container: a cgroup made of files, and real namespaces with a read-only root and low limits."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from shared.doctor import container, limits
from shared.doctor.cgroup import Cgroup
from shared.doctor.examination import CHECKS, attempt
from shared.doctor.finding import Finding, Level
from shared.doctor.surroundings import Surroundings
from tests.shared.doctor.places import examine_under, host, level_of, need, the, write

Check = Callable[[Surroundings], Iterable[Finding]]
V2 = {"proc/self/cgroup": "0::/pod/worker\n"}
SETTINGS = ("threads=2", "model=none-such")


# kind -> (check, level, what the container is, a part of the message, a part of the remedy)
PROVOKED: dict[str, tuple[Check, Level, Callable[[Path], Surroundings], str, str]] = {
    "memory limit too low": (
        limits.memory,
        "error",
        lambda p: host(p, *SETTINGS, files={"sys/fs/cgroup/memory.max": f"{400 << 20}\n"}),
        "400 MiB of memory, and one worker alone takes 456 MiB",
        "mem_limit: 570m",
    ),
    "memory limit below all workers": (
        limits.memory,
        "warning",
        lambda p: host(p, *SETTINGS, files={**V2, "sys/fs/cgroup/pod/memory.max": f"{1 << 30}\n"}),
        "not for all of `tandem up` (1,424 MiB)",
        "memory: 1780Mi",
    ),
    "CPU quota": (
        limits.cpu_quota,
        "warning",
        lambda p: host(p, *SETTINGS, files={"sys/fs/cgroup/cpu.max": "150000 100000\n"}),
        "time of 1.5 cores, and each worker computes with 2 threads",
        "TANDEM_THREADS: 1",
    ),
    "few processes": (
        limits.processes,
        "warning",
        lambda p: host(p, *SETTINGS, files={"sys/fs/cgroup/pids.max": "100\n"}),
        "100 processes and threads, and `tandem up` takes 148",
        "pids_limit: 4096",
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
def contained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Finding]]:
    """What root finds in namespaces of its own below a read-only root, with low limits and a socket from outside."""
    become_root = ("--user", "--map-root-user") if os.geteuid() else ()
    namespaces = ("unshare", *become_root, "--mount", "--pid", "--ipc", "--fork", "--mount-proc")
    read_only = ("sh", "-c", 'mount -o remount,bind,ro / && exec "$@"', "sh")
    need(*namespaces, *read_only)
    folder = tmp_path_factory.mktemp("sockets")
    with socket.socket(socket.AF_UNIX) as worker:
        worker.bind(str(folder / "0.sock"))
        worker.listen()
        yield examine_under(
            *("prlimit", "--nofile=1024", "--memlock=65536"),
            *namespaces,
            *read_only,
            assignments=["device=cuda", "transport.cuda_export=handle", f"transport.socket_dir={folder}"],
            environment={"HOME": "/root", "XDG_CACHE_HOME": "", "TMPDIR": ""},
        )


# kind -> (level, a part of the message, a part of the remedy), of `contained`
PROVOKED_TOGETHER: dict[str, tuple[Level, str, str]] = {
    "root": ("warning", "root in a container", 'user: "1000:1000"'),
    "cache not writable": ("error", "/root/.cache takes no models", "- cache:/cache"),
    "temporary folder not writable": ("error", "there is none to write to", "tmpfs:\n    - /tmp"),
    "namespaces not shared": ("warning", "(pid, ipc)", "pid: host\n  ipc: host"),
    "another PID namespace": ("warning", "0.sock is in another PID namespace", "cuda_export: descriptor"),
    "socket folder unusable": ("warning", "Read-only file system", "TANDEM_TRANSPORT__SOCKET_DIR: /run/tandem"),
    "few open files": ("warning", "1024 open files", "nofile: 65536"),
    "little locked memory": ("warning", "0 MiB may be locked", "memlock: -1"),
}


@pytest.mark.parametrize("kind", PROVOKED_TOGETHER)
def test_each_finding_in_a_real_container(kind: str, contained: list[Finding]) -> None:
    level, message, remedy = PROVOKED_TOGETHER[kind]
    finding = the(contained, kind)
    assert finding.level == level
    assert message in finding.message
    assert remedy in finding.remedy


def test_no_check_fails_in_a_container(contained: list[Finding]) -> None:
    assert [finding for finding in contained if finding.kind == "check failed"] == []


def test_a_container_with_nothing_amiss(tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    room = {
        **V2,
        "sys/fs/cgroup/pod/memory.max": f"{8 << 30}\n",
        "sys/fs/cgroup/pod/worker/memory.max": "max\n",
        "sys/fs/cgroup/pod/worker/cpu.max": "200000 100000\n",
        "sys/fs/cgroup/pod/worker/pids.max": "max\n",
    }
    surroundings = host(tmp_path, *SETTINGS, files=room, environment=environment)
    findings = [finding for check in CHECKS["container"] for finding in attempt(check, surroundings)]
    amiss = [finding.kind for finding in findings if finding.level != "ok"]
    assert amiss == (["root"] if os.geteuid() == 0 else [])
    assert not (tmp_path / "cache").exists(), "looking leaves nothing"


def test_the_namespaces_of_a_host_are_shared(tmp_path: Path) -> None:
    settings = (f"transport.socket_dir={tmp_path}", "transport.cuda_export=handle", "device=cuda")
    assert level_of(container.namespaces(host(tmp_path / "a", *settings)), "namespaces") == "ok"
    own = {"proc/self/ns/pid": "->pid:[1]", "proc/self/ns/ipc": "->ipc:[1]"}
    descriptor = host(tmp_path / "b", "device=cuda", files=own)
    assert level_of(container.namespaces(descriptor), "namespaces") == "ok"


def test_the_limit_of_a_login_on_processes() -> None:
    """root may exceed its own."""
    login = ("unshare", "--user", "prlimit", "--nproc=100")
    need(*login)
    finding = the(examine_under(*login, assignments=SETTINGS), "few processes")
    assert "100 processes and threads, and `tandem up` takes 148" in finding.message
    assert "ulimit -u 4096" in finding.remedy


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    finding = the(container.cache(host(tmp_path)), "cache not writable")
    assert "has no home" in finding.message
    assert level_of(container.cache(host(tmp_path / "b", environment={"HOME": str(tmp_path)})), "cache") == "ok"


def test_the_tightest_cgroup_on_the_way_up_counts(tmp_path: Path) -> None:
    tree = {
        "proc/self/cgroup": "0::/a/b\n",
        "cgroup/a/memory.max": "1000\n",
        "cgroup/a/b/memory.max": "2000\n",
        "cgroup/a/b/cpu.max": "max 100000\n",
        "cgroup/a/cpu.max": "50000 100000\n",
        "cgroup/a/b/pids.max": "7\n",
    }
    write(tmp_path, tree)
    cgroup = Cgroup(tmp_path / "proc", tmp_path / "cgroup")
    assert (cgroup.memory_bytes, cgroup.cpus, cgroup.processes) == (1000, 0.5, 7)


def test_a_cgroup_of_version_1_whose_path_is_not_to_be_seen(tmp_path: Path) -> None:
    tree = {
        "proc/self/cgroup": "3:memory:/docker/0123\n2:cpu,cpuacct:/docker/0123\n4:pids:/docker/0123\n0::/\n",
        "cgroup/memory/memory.limit_in_bytes": "4096\n",
        "cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
        "cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "cgroup/pids/pids.max": "max\n",
    }
    write(tmp_path, tree)
    cgroup = Cgroup(tmp_path / "proc", tmp_path / "cgroup")
    assert (cgroup.memory_bytes, cgroup.cpus, cgroup.processes) == (4096, 2.5, None)


def test_no_limits_at_all(tmp_path: Path) -> None:
    tree = {
        "proc/self/cgroup": "3:memory:/\n2:cpu:/\n",
        "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    write(tmp_path, tree)
    for proc in (tmp_path / "proc", tmp_path / "nowhere"):
        cgroup = Cgroup(proc, tmp_path / "cgroup")
        assert (cgroup.memory_bytes, cgroup.cpus, cgroup.processes) == (None, None, None)


def test_without_prefill_workers_the_least_is_what_a_decode_worker_takes(tmp_path: Path) -> None:
    container = host(tmp_path, *SETTINGS, "up.prefill=0", files={"sys/fs/cgroup/memory.max": f"{600 << 20}\n"})
    finding = the(limits.memory(container), "memory limit too low")
    assert "one worker alone takes 968 MiB" in finding.message
