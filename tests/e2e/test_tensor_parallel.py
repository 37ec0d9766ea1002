"""Workers of several ranks: whatever the ranks on either side, a request has the bits that one process each gives it.

And what becomes of a request, and of the processes, when one of the ranks dies.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tandem.v1 import types_pb2, worker_pb2, worker_pb2_grpc

from cli.process import StartError
from cli.supervisor import Member, Supervisor
from shared.batch import BatchEntry
from shared.rpc import connect
from tests.cluster import Cluster
from tests.e2e.faults import Stream, ask, prompt
from tests.engines import tiny_engine
from tests.workers import Request, Result, generate, sampling, settled

SHARED_MEMORY, INLINE = types_pb2.TRANSPORT_SHARED_MEMORY, types_pb2.TRANSPORT_INLINE
COMMON = {"dtype": "float32", "threads": 1, "max_context": 512, "drain_s": 0}
# ranks, and what else is set; a small pool has sequences swapped out
PREFILL = {"1": {}, "2": {"prefill.tp": 2, "prefill.chunk_tokens": 24, "prefill.batch_tokens": 48}}
DECODE = {
    "1": {},
    "2": {"decode.tp": 2, "decode.num_blocks": 14},
    "1, inline": {"transport.disable": ["shared_memory"]},
    "2, inline, blocks of 32": {"decode.tp": 2, "decode.block_tokens": 32, "transport.disable": ["shared_memory"]},
}
PAIRS = [("1", "2"), ("2", "1"), ("2", "2"), ("2", "1, inline"), ("1", "2, inline, blocks of 32")]
REQUESTS = {
    "greedy": Request(prompt(70), sampling(max_tokens=30, logprobs=2)),
    "seeded, three outputs": Request(
        prompt(45),
        sampling(max_tokens=20, temperature=0.9, top_p=0.95, n=3, seed=3, repetition_penalty=1.2, logprobs=1),
    ),
    "prompt's logprobs": Request(prompt(33), sampling(max_tokens=5, prompt_logprobs=1)),
}


class Workers:
    """Started when they are first asked for, and kept."""

    def __init__(self, supervisor: Supervisor, stack: AsyncExitStack) -> None:
        self.supervisor, self.stack = supervisor, stack
        self.channels: dict[tuple[str, str], grpc.aio.Channel] = {}
        self.members: dict[tuple[str, str], Member] = {}

    async def start(self, role: str, name: str, settings: dict[str, Any]) -> None:
        process = "prefill_worker" if role == "prefill" else "decode_worker"
        self.members[role, name] = await self.supervisor.start(process, {f"{role}.port": 0, **settings}, name=name)
        channel = connect(self.members[role, name].grpc)
        self.stack.push_async_callback(channel.close)
        self.channels[role, name] = channel


@asynccontextmanager
async def workers_of(
    model: Path, prefill: dict[str, dict[str, Any]], decode: dict[str, dict[str, Any]]
) -> AsyncIterator[Workers]:
    settings = {"model": str(model), **COMMON, "prefill.num_blocks": 96, "decode.num_blocks": 96}
    async with (
        Supervisor(settings=settings, on_line=lambda name, line: print(name, line)) as supervisor,
        AsyncExitStack() as stack,
    ):
        workers = Workers(supervisor, stack)
        starts = [workers.start("prefill", *item) for item in prefill.items()]
        await asyncio.gather(*starts, *(workers.start("decode", *item) for item in decode.items()))
        yield workers


@pytest.fixture(scope="module")
async def workers(tiny_model: Callable[[str], Path]) -> AsyncIterator[Workers]:
    async with workers_of(tiny_model("llama"), PREFILL, DECODE) as workers:
        yield workers


@pytest.fixture(scope="module")
async def expected(workers: Workers) -> dict[str, Any]:
    """Of one process on either side."""
    prefill, decode = workers.channels["prefill", "1"], workers.channels["decode", "1"]
    return {name: (await generate(prefill, decode, request)).bits for name, request in REQUESTS.items()}


@pytest.mark.parametrize(("prefill", "decode"), PAIRS)
async def test_a_handoff_between_any_ranks_keeps_every_bit(
    workers: Workers, expected: dict[str, Any], prefill: str, decode: str
) -> None:
    """All requests at once, and again, when their first blocks are in the prefix caches."""
    channels = workers.channels["prefill", prefill], workers.channels["decode", decode]
    for again in (False, True):
        results = await asyncio.gather(*(generate(*channels, request) for request in REQUESTS.values()))
        for name, result in zip(REQUESTS, results, strict=True):
            assert result.bits == expected[name], name
        first = results[0]
        assert first.imported is not None
        assert first.imported.transport == (INLINE if "inline" in decode else SHARED_MEMORY)
        if again:
            assert first.reserved.held_tokens == 64
        await asyncio.gather(*map(settled, channels))


async def test_sequences_that_are_swapped_out_come_back_on_all_ranks(workers: Workers) -> None:
    """13 blocks for five sequences that grow to 5 blocks each."""
    requests = [Request(prompt(40, seed), sampling(max_tokens=36, logprobs=1)) for seed in range(5)]
    prefill = workers.channels["prefill", "2"]
    wide, narrow = workers.channels["decode", "1"], workers.channels["decode", "2"]
    alone = [await generate(prefill, wide, request) for request in requests]
    together: list[Result] = await asyncio.gather(*(generate(prefill, narrow, request) for request in requests))
    assert sum(result.preemptions for result in together) > 0
    assert [result.bits for result in together] == [result.bits for result in alone]
    await settled(narrow)


async def test_a_prompt_computed_by_the_decode_workers_ranks(workers: Workers, expected: dict[str, Any]) -> None:
    for name, request in REQUESTS.items():
        assert (await generate(None, workers.channels["decode", "2"], request)).bits == expected[name]


async def test_a_worker_says_how_many_ranks_it_has(workers: Workers) -> None:
    infos = {}
    for key, channel in workers.channels.items():
        infos[key] = await worker_pb2_grpc.WorkerServiceStub(channel).GetInfo(worker_pb2.GetInfoRequest())
    assert [infos["decode", name].tp for name in DECODE] == [1, 2, 1, 2]
    # the layout is that of all its pools
    assert infos["prefill", "2"].layout == infos["prefill", "1"].layout
    for key, info in infos.items():
        assert len(ranks_of(workers.members[key].pid)) == info.tp - 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "prefill", "decode"),
    [("bloom", 1, 3), ("bloom", 3, 2), ("bloom", 6, 1), ("llama", 4, 1), ("llama", 2, 4), ("mixtral", 2, 2)],
)
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
async def test_other_ranks_and_families(
    tiny_model: Callable[[str], Path], family: str, prefill: int, decode: int, kv_dtype: str
) -> None:
    """Uneven heads, heads that several ranks have, and experts."""
    kept = {"kv_dtype": kv_dtype}
    async with workers_of(
        tiny_model(family),
        {"one": kept, "many": {**kept, "prefill.tp": prefill}},
        {"one": kept, "many": {**kept, "decode.tp": decode}},
    ) as workers:
        for request in REQUESTS.values():
            alone, together = [
                await generate(workers.channels["prefill", name], workers.channels["decode", name], request)
                for name in ("one", "many")
            ]
            assert together.bits == alone.bits


# -- a service that loses a rank --------------------------------------------------------------------------------------


def ranks_of(pid: int) -> list[int]:
    """The processes of a worker's ranks but the leading one: its children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


async def gone(pids: list[int]) -> None:
    """Returns once none of the processes runs any more."""
    loop = asyncio.get_running_loop()
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ended = asyncio.Event()
        loop.add_reader(fd, ended.set)
        try:
            await asyncio.wait_for(ended.wait(), 20)
        finally:
            loop.remove_reader(fd)
            os.close(fd)


@pytest.fixture(scope="module")
async def service(tiny_model: Callable[[str], Path]) -> AsyncIterator[Cluster]:
    """A worker of two ranks of each kind, with keys and values in int8. What dies comes back."""
    settings = {
        **COMMON,
        "tp": 2,
        "kv_dtype": "int8",
        "prefill.chunk_tokens": 16,
        "prefill.batch_tokens": 16,
        "gateway.recovery_wait_s": 60,
        "gateway.max_attempts": 12,
    }
    async with Cluster(model=str(tiny_model("llama")), settings=settings, revive=True) as cluster:
        yield cluster


def greedy_int8(model: Path, token_ids: list[int], count: int) -> list[int]:
    """Of an engine by itself."""
    engine = tiny_engine(model, kv_dtype="int8")
    tokens, start = list(token_ids), 0
    for _ in range(count):
        logits = engine.forward([BatchEntry(tokens[start:], start, list(range(1, 33)))])
        start = len(tokens)
        tokens.append(int(logits.argmax()))
    return tokens[len(token_ids) :]


async def test_a_service_of_ranks_with_a_quantized_cache(service: Cluster, tiny_model: Callable[[str], Path]) -> None:
    result = await service.generate(ask(prompt(60), max_tokens=40))
    assert result.outputs[0].token_ids == greedy_int8(tiny_model("llama"), prompt(60), 40)
    assert result.receipt.transport == SHARED_MEMORY
    info = await service.info(service.decode[0])
    assert (info.tp, info.layout.dtype, info.layout.num_kv_heads) == (2, "int8", 2)
    await service.settled()


@pytest.mark.parametrize("role", ["decode", "prefill"])
async def test_a_rank_that_is_killed_takes_its_worker_along_which_comes_back(
    service: Cluster, tiny_model: Callable[[str], Path], role: str
) -> None:
    """The request waits for the worker that is started in its place, and goes on with the very tokens."""
    [member] = service.decode if role == "decode" else service.prefill
    before, num_lines, pid = member.restarts, len(service.log), member.pid
    [rank] = ranks_of(member.pid)
    token_ids = prompt(100 if role == "decode" else 350)
    count = 120 if role == "decode" else 30
    stream = Stream(service.stub.Generate(ask(token_ids, max_tokens=count), timeout=120))
    if role == "decode":
        await stream.until(10)
    else:
        await service.until(member, lambda load: load.queued_tokens and load.running)
    os.kill(rank, signal.SIGKILL)
    result = await stream.rest()
    assert result.outputs[0].token_ids == greedy_int8(tiny_model("llama"), token_ids, count)
    await service.logged(member.name, "this worker has failed: ", "rank", after=num_lines)
    await service.logged(member.name, "ended with status 1; starts again", after=num_lines)
    await service.logged(member.name, "is back", after=num_lines)
    assert member.restarts == before + 1
    assert member.pid != pid
    await gone([pid, rank])
    await service.known(member)
    again = await service.generate(ask(token_ids, max_tokens=count))
    assert again.outputs[0].token_ids == result.outputs[0].token_ids
    await service.settled()


@asynccontextmanager
async def lone_worker(model: Path, *changed: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str, list[int]]]:
    """A decode worker of two ranks with nobody above it: the process, its address, its other ranks."""
    settings = ("decode.port=0", "decode.num_blocks=64", *(f"{key}={value}" for key, value in COMMON.items()))
    command = [sys.executable, "-m", "decode_worker", "--tp", "2", "--set", f"model={model}"]
    for setting in (*settings, *changed):
        command += ["--set", setting]
    running = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        assert running.stdout is not None
        async with asyncio.timeout(60):
            line = await running.stdout.readline()
        assert line, (await running.communicate())[1].decode()
        yield running, json.loads(line)["grpc"], ranks_of(running.pid)
    finally:
        if running.returncode is None:
            running.kill()
        await running.communicate()


async def test_sigterm_ends_all_ranks_in_order(tiny_model: Callable[[str], Path]) -> None:
    """Also one that a service manager sends to the ranks too, while they compute."""
    async with lone_worker(tiny_model("llama"), "drain_s=20") as (running, address, ranks):
        channel = connect(address)
        request = Request(prompt(20), sampling(max_tokens=300))
        serving = asyncio.create_task(generate(None, channel, request))
        while not (await worker_load(channel)).running:
            pass
        for pid in (*ranks, running.pid):
            os.kill(pid, signal.SIGTERM)
        assert len((await serving).outputs[0].token_ids) == 300
        _, stderr = await asyncio.wait_for(running.communicate(), 20)
        assert running.returncode == 0
        assert "rank 1 ended" not in stderr.decode()
        assert "Traceback" not in stderr.decode()
        await gone(ranks)
        await channel.close()


async def test_a_killed_leading_rank_leaves_no_orphan(tiny_model: Callable[[str], Path]) -> None:
    """Killed alone, in the middle of a request: in a collective as likely as not."""
    async with lone_worker(tiny_model("llama")) as (running, address, ranks):
        assert len(ranks) == 1
        channel = connect(address)
        serving = asyncio.create_task(generate(None, channel, Request(prompt(20), sampling(max_tokens=400))))
        while not (await worker_load(channel)).running:
            pass
        os.kill(running.pid, signal.SIGKILL)
        await gone([running.pid, *ranks])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await serving
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        await channel.close()


@pytest.mark.slow
async def test_a_rank_that_dies_idle_is_noticed_and_one_that_hangs_is_told(tiny_model: Callable[[str], Path]) -> None:
    async with lone_worker(tiny_model("llama")) as (running, address, [rank]):
        channel = connect(address)
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await health.read()).status == health_pb2.HealthCheckResponse.SERVING
        os.kill(rank, signal.SIGSTOP)
        serving = asyncio.create_task(generate(None, channel, Request(prompt(20), sampling())))
        async with asyncio.timeout(30):
            assert (await health.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        os.kill(rank, signal.SIGCONT)
        assert len((await serving).outputs[0].token_ids) == 8
        assert (await health.read()).status == health_pb2.HealthCheckResponse.SERVING
        health.cancel()
        os.kill(rank, signal.SIGKILL)
        _, stderr = await asyncio.wait_for(running.communicate(), 20)
        assert running.returncode == 1
        assert "rank 1 ended with SIGKILL" in stderr.decode()
        await channel.close()


async def worker_load(channel: grpc.aio.Channel) -> worker_pb2.WatchLoadResponse:
    call = worker_pb2_grpc.WorkerServiceStub(channel).WatchLoad(worker_pb2.WatchLoadRequest())
    try:
        return await call.read()
    finally:
        call.cancel()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decode.tp": 5}, "decode.tp: .*4 query heads cannot be cut for 5 ranks"),
        ({"tp": 3}, "tp: .*2 key-value heads cannot be cut for 3 ranks"),
    ],
)
async def test_more_ranks_than_heads_are_refused_before_a_weight_is_read(
    tiny_model: Callable[[str], Path], tmp_path: Path, settings: dict[str, int], message: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_model("llama").iterdir():
        if path.suffix != ".safetensors":
            (model / path.name).write_bytes(path.read_bytes())
    (model / "model.safetensors").write_bytes(b"no weights")
    supervisor = Supervisor(settings={"model": str(model), **COMMON, "decode.port": 0}, on_line=lambda name, line: None)
    async with supervisor:
        with pytest.raises(StartError, match=message):
            await supervisor.start("decode_worker", settings)


@pytest.mark.slow
async def test_a_worker_that_nobody_starts_again_ends_its_requests_unavailable(
    tiny_model: Callable[[str], Path],
) -> None:
    """After the documented wait, which is none here. Without its prefill worker the decode worker computes prompts."""
    settings = {**COMMON, "tp": 2, "gateway.recovery_wait_s": 0}
    async with Cluster(model=str(tiny_model("llama")), settings=settings) as cluster:
        expected = await cluster.generate(ask(prompt(60), max_tokens=20))
        [prefill], [decode] = cluster.prefill, cluster.decode
        assert prefill.process is not None
        assert decode.process is not None
        os.kill(ranks_of(prefill.pid)[0], signal.SIGKILL)
        assert await prefill.process.wait() == 1
        again = await cluster.generate(ask(prompt(60), max_tokens=20))
        assert again.outputs[0].token_ids == expected.outputs[0].token_ids
        stream = Stream(cluster.stub.Generate(ask(prompt(60), max_tokens=400), timeout=60))
        await stream.until(5)
        os.kill(ranks_of(decode.pid)[0], signal.SIGKILL)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.rest()
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert await decode.process.wait() == 1


@pytest.mark.slow
async def test_one_flag_has_every_worker_of_two_ranks(tiny_model: Callable[[str], Path]) -> None:
    """`tandem up --tp 2`, and one role otherwise."""
    root = Path(__file__).parents[2]
    flags = ("--model", str(tiny_model("llama")), "--dtype", "float32", "--port", "0", "--http-port", "0")
    process = await asyncio.create_subprocess_exec(
        str(root / "tandem"), "up", *flags, "--tp", "2", "--set", "prefill.tp=1", "--set", "decode.num_blocks=32",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        text = ""
        async with asyncio.timeout(120):
            while "Ctrl-C stops it" not in text:
                line = await process.stdout.readline()
                assert line, (await process.communicate())[1].decode()
                text += line.decode()
        workers = [pid for pid in ranks_of(process.pid) if "gateway" not in command_of(pid)]
        assert {role_of(pid): len(ranks_of(pid)) for pid in workers} == {"prefill_worker": 0, "decode_worker": 1}
        everyone = [*workers, *(rank for pid in workers for rank in ranks_of(pid))]
        process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 0
        await gone(everyone)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


def command_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def role_of(pid: int) -> str:
    command = command_of(pid)
    return command[command.index("-m") + 1]
