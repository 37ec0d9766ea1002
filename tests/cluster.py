"""A real Tandem for tests: gateway and workers as processes, with the handles that fault and scale tests need.

    async with Cluster(model=str(folder), prefill=2, settings={"dtype": "float32"}) as cluster:
        result = await cluster.generate(request)
        await cluster.prefill[0].kill()
        await cluster.decode[0].restart({"decode.max_running": 4})
        await cluster.settled()

`settings` are configuration keys as `--set` takes them; `prefill_settings` and `decode_settings` go to one kind of
worker. Pools are of 32 MiB unless the settings say otherwise: plenty for a tiny model, and quickly populated.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc
import httpx
from tandem.v1 import inference_pb2, inference_pb2_grpc, types_pb2, worker_pb2, worker_pb2_grpc

from cli.supervisor import Member, Role, Supervisor, role_command
from shared.rpc import connect

SETTLE_S = 60.0
SMALL_POOLS = {"prefill.kv_memory_mib": 32, "decode.kv_memory_mib": 32}
DEFAULT_MODEL_POOLS = {"prefill.kv_memory_mib": 256, "decode.kv_memory_mib": 512}


@dataclass
class OutputResult:
    """One output, its chunks joined."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[types_pb2.PositionLogprobs] = field(default_factory=list)
    finish_reason: int = 0
    stop_match: str = ""


@dataclass
class Result:
    """A whole stream. Joining checks that each position came exactly once."""

    outputs: dict[int, OutputResult] = field(default_factory=dict)
    prompt_logprobs: list[types_pb2.PositionLogprobs] = field(default_factory=list)
    request_id: str = ""
    resolved: types_pb2.SamplingParams = field(default_factory=types_pb2.SamplingParams)
    usage: types_pb2.Usage = field(default_factory=types_pb2.Usage)
    timings: types_pb2.Timings = field(default_factory=types_pb2.Timings)
    receipt: types_pb2.Receipt = field(default_factory=types_pb2.Receipt)

    def add(self, chunk: inference_pb2.GenerateResponse) -> None:
        self.request_id = self.request_id or chunk.request_id
        self.prompt_logprobs.extend(chunk.prompt_logprobs)
        for name, target in (
            ("resolved_sampling", self.resolved),
            ("usage", self.usage),
            ("timings", self.timings),
            ("receipt", self.receipt),
        ):
            if chunk.HasField(name):
                target.CopyFrom(getattr(chunk, name))
        for new in chunk.outputs:
            output = self.outputs.setdefault(new.index, OutputResult())
            assert not output.finish_reason, f"output {new.index} goes on after its end"
            assert new.position == len(output.token_ids), f"output {new.index}: a gap or a repeat at {new.position}"
            output.token_ids.extend(new.token_ids)
            output.text += new.text
            output.logprobs.extend(new.logprobs)
            output.finish_reason = new.finish_reason
            output.stop_match = new.stop_match


async def collect(stream: AsyncIterator[inference_pb2.GenerateResponse]) -> Result:
    """Reads a stream to its end."""
    result = Result()
    async for chunk in stream:
        result.add(chunk)
    return result


@dataclass(frozen=True)
class Resources:
    """What a process holds; equal before and after, or something leaked."""

    sockets_and_files: int
    tasks: int
    allocated_blocks: int
    exports: int


class Cluster:
    """See the module. Ports are ephemeral; members keep theirs over restarts."""

    gateway: Member
    prefill: list[Member]
    decode: list[Member]

    def __init__(
        self,
        *,
        model: str,
        prefill: int = 1,
        decode: int = 1,
        settings: Mapping[str, Any] | None = None,
        prefill_settings: Mapping[str, Any] | None = None,
        decode_settings: Mapping[str, Any] | None = None,
        gateway_settings: Mapping[str, Any] | None = None,
        config_path: Path | None = None,
        revive: bool = False,
        command: Callable[[Role], Sequence[str]] = role_command,
        reach: Callable[[str], str] = str,
    ) -> None:
        """command: what runs a role, without its flags. reach: from a member's address to where we reach it."""
        self.log: list[str] = []
        self._logged = asyncio.Event()
        self._supervisor = Supervisor(
            settings={"model": model, "drain_s": 0, **SMALL_POOLS, **(settings or {})},
            config_path=config_path,
            on_line=self._take_line,
            revive=revive,
            command=command,
        )
        self._reach = reach
        self._counts = prefill, decode
        self._settings = prefill_settings or {}, decode_settings or {}, gateway_settings or {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        # one connection, kept open: one that is closing would be counted among what the gateway holds, or not
        self._http = httpx.AsyncClient(trust_env=False)

    async def __aenter__(self) -> Self:
        try:
            num_prefill, num_decode = self._counts
            prefill, decode, gateway = self._settings
            workers = await asyncio.gather(
                *(self.add_prefill(prefill) for _ in range(num_prefill)),
                *(self.add_decode(decode) for _ in range(num_decode)),
            )
            self.prefill, self.decode = list(workers[:num_prefill]), list(workers[num_prefill:])
            self.gateway = await self._supervisor.start(
                "gateway",
                {
                    "gateway.port": 0,
                    "gateway.http_port": 0,
                    "gateway.prefill_workers": [member.grpc for member in self.prefill],
                    # a model that embeds has none, and the configuration wants one
                    **({"gateway.decode_workers": [member.grpc for member in self.decode]} if self.decode else {}),
                    **gateway,
                },
            )
        except BaseException:
            await self._supervisor.stop()
            print("\n".join(self.log))
            raise
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        await asyncio.gather(self._http.aclose(), *(channel.close() for channel in self._channels.values()))
        await self._supervisor.stop()
        if exc_type is not None:
            print("\n".join(self.log[-200:]))

    async def add_prefill(self, settings: Mapping[str, Any] | None = None) -> Member:
        """One more prefill worker; the gateway is told of those that stand when it starts."""
        return await self._supervisor.start("prefill_worker", {"prefill.port": 0, **(settings or {})})

    async def add_decode(self, settings: Mapping[str, Any] | None = None) -> Member:
        """One more decode worker, likewise."""
        return await self._supervisor.start("decode_worker", {"decode.port": 0, **(settings or {})})

    @property
    def workers(self) -> list[Member]:
        return [*self.prefill, *self.decode]

    @property
    def members(self) -> list[Member]:
        return [self.gateway, *self.workers]

    @property
    def grpc_target(self) -> str:
        """host:port of the gateway's gRPC service."""
        return self.gateway.grpc

    @property
    def http_url(self) -> str:
        """Base address of the gateway's HTTP service."""
        return f"http://{self._reach(self.gateway.http or '')}"

    def channel(self, target: str) -> grpc.aio.Channel:
        """A channel that the cluster closes at its end."""
        return self._channels.setdefault(target, connect(self._reach(target)))

    @property
    def stub(self) -> inference_pb2_grpc.InferenceServiceStub:
        return inference_pb2_grpc.InferenceServiceStub(self.channel(self.grpc_target))

    async def generate(self, request: inference_pb2.GenerateRequest, timeout_s: float | None = 240) -> Result:
        """The whole answer of a request."""
        return await collect(self.stub.Generate(request, timeout=timeout_s))

    async def token_ids(self, request: inference_pb2.GenerateRequest) -> list[int]:
        """The tokens of a request's prompt."""
        match request.WhichOneof("prompt"):
            case "token_ids":
                return list(request.token_ids.ids)
            case "messages":
                tokenize = inference_pb2.TokenizeRequest(messages=request.messages)
            case _:
                tokenize = inference_pb2.TokenizeRequest(text=request.text)
        return list((await self.stub.Tokenize(tokenize)).token_ids)

    async def info(self, member: Member) -> worker_pb2.GetInfoResponse:
        """A worker's description."""
        return await worker_pb2_grpc.WorkerServiceStub(self.channel(member.grpc)).GetInfo(worker_pb2.GetInfoRequest())

    async def load(self, member: Member) -> worker_pb2.WatchLoadResponse:
        """A worker's load now."""
        async for load in self.watch(member):
            return load
        raise AssertionError(f"{member.name} ended its load stream")

    async def watch(self, member: Member) -> AsyncIterator[worker_pb2.WatchLoadResponse]:
        """A worker's load, at once and whenever it changes."""
        stub = worker_pb2_grpc.WorkerServiceStub(self.channel(member.grpc))
        call = stub.WatchLoad(worker_pb2.WatchLoadRequest(interval_s=0.01), wait_for_ready=True)
        try:
            async for load in call:
                yield load
        finally:
            call.cancel()

    async def settled(self) -> None:
        """Returns once no worker holds anything for a request: no block, no export, nobody running or waiting."""

        async def one(member: Member) -> None:
            last = None
            try:
                async with asyncio.timeout(SETTLE_S):
                    async for load in self.watch(member):
                        last = load
                        if not (load.running or load.waiting or load.allocated_blocks or load.exports):
                            assert load.free_blocks == load.total_blocks
                            return
            except TimeoutError:
                raise AssertionError(f"{member.name} still holds something after {SETTLE_S} s:\n{last}") from None

        await asyncio.gather(*(one(member) for member in self.workers if member.alive))

    async def until(
        self, members: Member | Sequence[Member], condition: Callable[[worker_pb2.WatchLoadResponse], object]
    ) -> Member:
        """The first of the members whose load meets the condition, once one does."""
        candidates = [members] if isinstance(members, Member) else members

        async def one(member: Member) -> Member:
            async for load in self.watch(member):
                if condition(load):
                    return member
            raise AssertionError(f"{member.name} ended its load stream")

        watching = [asyncio.create_task(one(member)) for member in candidates if member.alive]
        try:
            async with asyncio.timeout(SETTLE_S):
                done, _ = await asyncio.wait(watching, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)

    async def logged(self, *parts: str, after: int = 0) -> str:
        """The first line of the log, from line number `after` on, that has all these parts, once it is there."""
        seen = after
        try:
            async with asyncio.timeout(SETTLE_S):
                while True:
                    self._logged.clear()
                    for line in self.log[seen:]:
                        if all(part in line for part in parts):
                            return line
                    seen = len(self.log)
                    await self._logged.wait()
        except TimeoutError:
            raise AssertionError(f"nobody logged {parts} within {SETTLE_S} s") from None

    async def known(self, *members: Member) -> None:
        """Returns once the gateway sends requests to these members' present processes."""
        for member in members:
            assert member.process
            await self.logged(self.gateway.name, f"({member.process.ready.worker_id}) is alive")

    def _take_line(self, name: str, line: str) -> None:
        self.log.append(f"{name} | {line}")
        self._logged.set()

    async def resources(self) -> dict[str, Resources]:
        """What each living process holds, by member name."""
        found = {}
        for member in self.members:
            # the gateway's own number of tasks is among its metrics
            load = await self.load(member) if member is not self.gateway else worker_pb2.WatchLoadResponse()
            tasks = load.tasks or int(await self.metric("tandem_tasks"))
            found[member.name] = Resources(
                sockets_and_files=len(os.listdir(f"/proc/{member.pid}/fd")),
                tasks=tasks,
                allocated_blocks=load.allocated_blocks,
                exports=load.exports,
            )
        return found

    async def back_to(self, before: dict[str, Resources]) -> None:
        """Returns once the processes in `before` hold what they held: what a stream's end gives back takes a moment."""
        now: dict[str, Resources] = {}
        try:
            async with asyncio.timeout(SETTLE_S):
                while now != before:
                    found = await self.resources()
                    now = {name: found[name] for name in before}
        except TimeoutError:
            raise AssertionError(f"not given back after {SETTLE_S} s:\nbefore {before}\nnow    {now}") from None

    async def metrics_text(self) -> str:
        """All metrics of the gateway."""
        return (await self._http.get(f"{self.http_url}/metrics")).text

    async def metric(self, name: str) -> float:
        """The value of a metric of the gateway that has no labels."""
        text = await self.metrics_text()
        [line] = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        return float(line.split()[1])
