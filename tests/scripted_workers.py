"""Workers that follow a script, over real gRPC: for faults and orders that real ones cannot be told to produce on time.

Their model is a hash of the token history, so that what must be generated is known.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from tandem.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    kv_pb2,
    prefill_pb2,
    prefill_pb2_grpc,
    types_pb2,
    worker_pb2,
    worker_pb2_grpc,
)

from shared.rpc import create_server, handler
from shared.tokenizer import Tokenizer
from tests import tiny_tokenizers

BLOCK_TOKENS = 4
MAX_CONTEXT = 512
TOKENIZER = Tokenizer(tiny_tokenizers.byte_level())
VOCAB_SIZE = 402
LENGTH = types_pb2.FINISH_REASON_LENGTH


def next_token(history: Sequence[int], index: int) -> int:
    """The scripted model: a letter that depends on every token before it, and on the output."""
    digest = hashlib.sha256(repr((list(history), index)).encode()).digest()
    return TOKENIZER.encode("abcdefghijklmnopqrstuvwxyz"[digest[0] % 26])[0]


def expected_tokens(prompt: Sequence[int], count: int, index: int = 0) -> list[int]:
    """What an undisturbed request generates."""
    history = list(prompt)
    for _ in range(count):
        history.append(next_token(history, index))
    return history[len(prompt) :]


def logprobs_of(token_id: int, params: types_pb2.SamplingParams) -> types_pb2.PositionLogprobs | None:
    if not params.HasField("logprobs"):
        return None
    return types_pb2.PositionLogprobs(chosen=types_pb2.TokenLogprob(token_id=token_id, logprob=-token_id / 10))


class ScriptedWorker(worker_pb2_grpc.WorkerServiceServicer):
    """What both roles have: a server that can be killed and started again at its port, and a load that can be told.

    target: where it listens.
    """

    role: worker_pb2.WorkerRole.ValueType

    def __init__(self, name: str) -> None:
        self.name = name
        self.starts = 0
        self.target = "127.0.0.1:0"
        self.layout: dict[str, Any] = {}
        self.info: dict[str, Any] = {}
        self.load = worker_pb2.WatchLoadResponse(free_blocks=100, total_blocks=100)
        self.open_streams = 0
        self.keys: list[str] = []
        self._changed = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    @property
    def worker_id(self) -> str:
        return f"{self.name}#{self.starts}"

    async def start(self) -> None:
        self.starts += 1
        server = create_server()
        port = server.add_insecure_port(self.target)
        self.target = f"{self.target.rpartition(':')[0]}:{port}"
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, server)
        self.serve(server)
        await server.start()
        self._server = server

    def serve(self, server: grpc.aio.Server) -> None:
        raise NotImplementedError

    async def kill(self) -> None:
        """Every stream breaks, and the port is closed."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def report(self, **load: Any) -> None:
        """A new load for the watchers."""
        self.load = worker_pb2.WatchLoadResponse(**load)
        self.changed()

    def changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until something about this worker holds; it is looked at whenever a stream begins or ends."""
        while not condition():
            await self._changed.wait()

    async def idle(self) -> None:
        await self.until(lambda: self.open_streams == 0)

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[None]:
        self.open_streams += 1
        self.changed()
        try:
            yield
        finally:
            self.open_streams -= 1
            self.changed()

    def _layout(self) -> kv_pb2.KvLayout:
        fields = {
            "contract_version": 1,
            "model_digest": "d1",
            "dtype": "float32",
            "num_layers": 2,
            "num_kv_heads": 1,
            "head_dim": 8,
            "block_tokens": BLOCK_TOKENS,
            "order": "blocks,layers",
            "digest": "l1",
        }
        return kv_pb2.KvLayout(**{**fields, **self.layout})

    async def GetInfo(self, request: Any, context: Any) -> worker_pb2.GetInfoResponse:
        self.keys += [str(value) for key, value in context.invocation_metadata() if key == "authorization"]
        fields = {
            "dtype": "float32",
            "worker_id": self.worker_id,
            "role": self.role,
            "model": "scripted",
            "family": "hash",
            "max_context": MAX_CONTEXT,
            "vocab_size": VOCAB_SIZE,
            "layout": self._layout(),
            "epoch": self.starts,
            "device": "none",
            "kv_endpoint": self.target,
            "num_blocks": 10_000,
        }
        return worker_pb2.GetInfoResponse(**{**fields, **self.info})

    async def WatchLoad(self, request: Any, context: Any) -> AsyncIterator[worker_pb2.WatchLoadResponse]:
        last = None
        while True:
            if last is not self.load:
                last = self.load
                yield last
            else:  # no await since the look: a report during the yield is not missed
                await self._changed.wait()


Script = Callable[..., AsyncIterator[Any]]


class ScriptedPrefill(ScriptedWorker, prefill_pb2_grpc.PrefillServiceServicer):
    """A prefill worker; `script` replaces what it does with a request."""

    role = worker_pb2.WORKER_ROLE_PREFILL

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.requests: list[prefill_pb2.PrefillRequest] = []
        self.script: Script = ScriptedPrefill.compute
        self.embed_requests: list[prefill_pb2.EmbedTokensRequest] = []
        self.embed_script: Callable[..., Awaitable[prefill_pb2.EmbedTokensResponse]] = ScriptedPrefill.embed

    def serve(self, server: grpc.aio.Server) -> None:
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self, server)

    @handler
    async def Prefill(self, request: prefill_pb2.PrefillRequest, context: grpc.aio.ServicerContext) -> None:
        self.requests.append(request)
        async with self.stream():
            async for reply in self.script(self, request):
                await context.write(reply)

    @handler
    async def EmbedTokens(
        self, request: prefill_pb2.EmbedTokensRequest, context: grpc.aio.ServicerContext
    ) -> prefill_pb2.EmbedTokensResponse:
        self.embed_requests.append(request)
        async with self.stream():
            return await self.embed_script(self, request)

    async def embed(self, request: prefill_pb2.EmbedTokensRequest) -> prefill_pb2.EmbedTokensResponse:
        """The sum of a text's tokens, as often as dimensions are asked for."""
        vectors = [
            prefill_pb2.Vector(values=[float(sum(sequence.token_ids))] * request.dimensions)
            for sequence in request.sequences
        ]
        return prefill_pb2.EmbedTokensResponse(vectors=vectors, queue_s=0.25, compute_s=1e-6, worker_id=self.worker_id)

    def extent(self, request: prefill_pb2.PrefillRequest) -> prefill_pb2.PrefillResponse:
        return prefill_pb2.PrefillResponse(
            extent=kv_pb2.KvExtent(
                kv_endpoint=self.target,
                epoch=self.starts,
                first_token=request.skip_tokens,
                num_tokens=len(request.token_ids) - request.skip_tokens,
                export_id=f"{self.worker_id}/{request.request_id}/{request.attempt}",
            )
        )

    def first_tokens(self, request: prefill_pb2.PrefillRequest) -> prefill_pb2.PrefillResponse:
        tokens = []
        position = len(request.token_ids) - request.num_prompt_tokens
        for index in request.output_indices:
            token_id = next_token(request.token_ids, index)
            last = position + 1 == request.sampling.max_tokens
            tokens.append(
                prefill_pb2.FirstToken(
                    index=index,
                    token_id=token_id,
                    logprobs=logprobs_of(token_id, request.sampling),
                    finish_reason=LENGTH if last else types_pb2.FINISH_REASON_UNSPECIFIED,
                )
            )
        prompt = []
        if request.sampling.HasField("prompt_logprobs"):
            prompt = [
                types_pb2.PositionLogprobs(chosen=types_pb2.TokenLogprob(token_id=token_id))
                for token_id in request.token_ids[1 : request.num_prompt_tokens]
            ]
        return prefill_pb2.PrefillResponse(
            first_tokens=prefill_pb2.FirstTokens(
                tokens=tokens, cached_tokens=2, worker_id=self.worker_id, prompt_logprobs=prompt
            )
        )

    async def compute(self, request: prefill_pb2.PrefillRequest) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        """The blocks, the first tokens, and then the export lives until the gateway ends the stream."""
        yield self.extent(request)
        yield self.first_tokens(request)
        await asyncio.Event().wait()


@dataclass
class Conversation:
    """A Decode stream as the script sees it."""

    worker: ScriptedDecode
    context: Any
    admit: decode_pb2.Admit
    imports: list[decode_pb2.ImportBlocks] = field(default_factory=list)
    begin: decode_pb2.Begin | None = None
    finished: set[int] = field(default_factory=set)

    async def read(self) -> str | None:
        """Takes the gateway's next step, and says its kind; None at the stream's end."""
        request = await self.context.read()
        if request is grpc.aio.EOF:
            return None
        kind = request.WhichOneof("event")
        if kind == "import_blocks":
            self.imports.append(request.import_blocks)
        elif kind == "begin":
            self.begin = request.begin
        elif kind == "finish":
            self.finished.update(request.finish.output_indices)
        self.worker.changed()
        return kind

    async def read_until(self, kind: str) -> None:
        while await self.read() not in (kind, None):
            pass

    def reserved(self, held_tokens: int = 0) -> decode_pb2.DecodeResponse:
        return decode_pb2.DecodeResponse(
            reserved=decode_pb2.Reserved(held_tokens=held_tokens, worker_id=self.worker.worker_id)
        )

    def imported(self, attempt: int | None = None) -> decode_pb2.DecodeResponse:
        assert self.begin
        return decode_pb2.DecodeResponse(
            imported=decode_pb2.Imported(
                attempt=self.begin.attempt if attempt is None else attempt,
                handoff_bytes=1000,
                handoff_s=0.001,
                transport=types_pb2.TRANSPORT_SHARED_MEMORY,
            )
        )

    def histories(self) -> dict[int, list[int]]:
        """Token histories of the outputs that go on, the first tokens included."""
        assert self.begin
        known = list(self.admit.token_ids)
        if self.begin.local_prefill:
            return {index: list(known) for index in self.admit.output_indices}
        return {token.index: [*known, token.token_id] for token in self.begin.first_tokens}

    def tokens(self, histories: dict[int, list[int]], count: int) -> decode_pb2.DecodeResponse:
        """The next tokens of every output that is not at its end, appended to their histories."""
        assert self.begin
        outputs = []
        limit = self.admit.num_prompt_tokens + self.admit.sampling.max_tokens
        for index, history in histories.items():
            start = len(history)
            while len(history) < min(start + count, limit):
                history.append(next_token(history, index))
            new = history[start:]
            if not new:
                continue
            logprobs = [logprobs_of(token_id, self.admit.sampling) for token_id in new]
            outputs.append(
                decode_pb2.OutputTokens(
                    index=index,
                    position=start - self.admit.num_prompt_tokens,
                    token_ids=new,
                    logprobs=[one for one in logprobs if one],
                    finish_reason=LENGTH if len(history) == limit else types_pb2.FINISH_REASON_UNSPECIFIED,
                )
            )
        return decode_pb2.DecodeResponse(tokens=decode_pb2.Tokens(outputs=outputs, attempt=self.begin.attempt))


class ScriptedDecode(ScriptedWorker, decode_pb2_grpc.DecodeServiceServicer):
    """A decode worker; `script` replaces what it does on a stream, `step` is the number of tokens in a message."""

    role = worker_pb2.WORKER_ROLE_DECODE

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.conversations: list[Conversation] = []
        self.connects: list[str] = []
        self.transport: types_pb2.Transport.ValueType = types_pb2.TRANSPORT_SHARED_MEMORY
        self.script: Script = ScriptedDecode.generate
        self.step = 1

    def serve(self, server: grpc.aio.Server) -> None:
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self, server)

    async def Connect(self, request: decode_pb2.ConnectRequest, context: Any) -> decode_pb2.ConnectResponse:
        self.connects.append(request.kv_endpoint)
        refusals = []
        if self.transport != types_pb2.TRANSPORT_SHARED_MEMORY:
            refusals = [types_pb2.TransportRefusal(transport=types_pb2.TRANSPORT_SHARED_MEMORY, reason="another host")]
        return decode_pb2.ConnectResponse(transport=self.transport, refusals=refusals)

    @handler
    async def Decode(self, requests: Any, context: grpc.aio.ServicerContext) -> None:
        async with self.stream():
            first = await context.read()
            conversation = Conversation(self, context, first.admit)
            self.conversations.append(conversation)
            self.changed()
            async for reply in self.script(self, conversation):
                await context.write(reply)

    async def generate(self, conversation: Conversation) -> AsyncIterator[decode_pb2.DecodeResponse]:
        """Reserve, import, generate to the end."""
        yield conversation.reserved()
        await conversation.read_until("begin")
        assert conversation.begin
        if not conversation.begin.local_prefill:
            yield conversation.imported()
        histories = conversation.histories()
        while (reply := conversation.tokens(histories, self.step)).tokens.outputs:
            yield reply

    async def generate_then_hang(
        self, conversation: Conversation, count: int
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        """Some tokens, and then nothing more."""
        yield conversation.reserved()
        await conversation.read_until("begin")
        yield conversation.imported()
        histories = conversation.histories()
        for _ in range(count):
            yield conversation.tokens(histories, self.step)
        await asyncio.Event().wait()
