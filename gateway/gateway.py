"""The gateway: takes requests, and streams what becomes of them. The gRPC service and the HTTP port are skins over it.

async with Gateway(config, model, metrics) as gateway:
    await gateway.ready()
    async with aclosing(gateway.generate(request)) as chunks:
        async for chunk in chunks: ...
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing

from tandem.v1 import inference_pb2, types_pb2

from gateway.admission import Admission
from gateway.budget import Budget
from gateway.discovery import Resolve, resolve
from gateway.embedding import Embedding
from gateway.embedding_job import resolve_embedding
from gateway.job import Job
from gateway.journal import Journal
from gateway.metrics import Metrics
from gateway.model import ServedModel
from gateway.output import Output
from gateway.record import Record
from gateway.record_store import Key, RecordStore
from gateway.request import Request
from gateway.resolution import Limits, check_labels, check_model, check_token_ids, resolve_sampling, tokenize_prompt
from gateway.router import prefix_hashes
from gateway.workers import Workers
from shared.config import TandemConfig
from shared.rpc import RpcError, invalid, mismatch, unavailable

# The least time that a budget can be spent in; a client that gives less has given nothing.
_LEAST_BUDGET_S = 1e-3


class Gateway:
    """One served model over its workers. Use it as an async context manager: every task it starts ends with it."""

    def __init__(self, config: TandemConfig, model: ServedModel, metrics: Metrics, resolve: Resolve = resolve) -> None:
        self.metrics = metrics
        self.gateway_id = f"gateway-{secrets.token_hex(4)}"
        self.workers = Workers(config, model, metrics, resolve)
        self._config, self._model = config.gateway, model
        self._admission = Admission(config.gateway.max_running, config.gateway.max_queued, metrics.set_queued)
        self._records = RecordStore(config.gateway.resume_window_s)
        self._tasks: dict[asyncio.Task[None], Record] = {}
        self._embeddings: set[asyncio.Task[inference_pb2.EmbedResponse]] = set()
        self._draining = False
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Gateway:
        await self._stack.enter_async_context(self.workers)
        self._stack.callback(self._records.close)
        self._stack.push_async_callback(self.cancel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def ready(self) -> None:
        """Waits for the workers. Raises StartError if they do not fit together."""
        await self.workers.ready()

    @property
    def serving(self) -> bool:
        """Whether a request that comes now can be answered."""
        return not self._draining and self.workers.serving

    @property
    def num_requests(self) -> int:
        """Requests in progress, those that wait included."""
        return len(self._tasks) + len(self._embeddings)

    async def drain(self, timeout_s: float) -> None:
        """Takes no new request, and gives those in progress so many seconds."""
        self._draining = True
        if self.num_requests:
            await asyncio.wait({*self._tasks, *self._embeddings}, timeout=timeout_s)

    # -- requests ---------------------------------------------------------------------------------------------------

    async def generate(
        self,
        request: inference_pb2.GenerateRequest,
        *,
        budget_s: float | None = None,
        resumable: bool = False,
        owner: str = "",
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """The stream of one request. Closing it, or cancelling its reader, cancels the request on every worker.

        budget_s: seconds for all of it, default gateway.default_deadline_s. resumable: a request with a request_id
        outlives its stream for gateway.resume_window_s; sent again, it attaches to what runs or ran. owner: whose it
        is; a request_id means nothing to others.
        Raises RpcError, with the codes of shared/rpc.py, before or after the first chunk.
        """
        key = (owner, request.request_id) if resumable and request.request_id else None
        try:
            record, task = await self._begin(request, self._budget(budget_s), key)
        except RpcError as error:
            self.metrics.request_refused(error.code.name, model=self._label(request.model))
            raise
        try:
            async with aclosing(self._records.read(key) if key else record.read()) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            if key is None and not record.ended:
                task.cancel()
                await asyncio.wait({task})

    async def resume(
        self, request: inference_pb2.ResumeRequest, *, owner: str = ""
    ) -> AsyncGenerator[inference_pb2.ResumeResponse, None]:
        """The rest of a request's stream.

        Raises NOT_FOUND if the request is not here, INVALID_ARGUMENT for a position beyond its tokens.
        """

        def positions(record: Record) -> Mapping[int, int]:
            found = {output.index: request.next_position for output in record.outputs}
            for index, position in request.next_positions.items():
                if index not in found:
                    raise invalid(f"next_positions[{index}]", f"the request has {len(found)} outputs")
                found[index] = position
            for output in record.outputs:
                if found[output.index] > len(output.token_ids):
                    named = output.index in request.next_positions
                    field = f"next_positions[{output.index}]" if named else "next_position"
                    raise invalid(field, f"output {output.index} has {len(output.token_ids)} tokens so far")
            return found

        if not request.request_id:
            raise invalid("request_id", "is empty")
        async with aclosing(self._records.read((owner, request.request_id), positions)) as chunks:
            async for chunk in chunks:
                yield inference_pb2.ResumeResponse(chunk=chunk)

    async def embed(
        self, request: inference_pb2.EmbedRequest, *, budget_s: float | None = None
    ) -> inference_pb2.EmbedResponse:
        """The vectors of a request. Cancelling the call drops what no worker has computed yet.

        budget_s: seconds for all of it, default gateway.default_deadline_s. Raises RpcError.
        """
        try:
            work = await self._embedding(request, self._budget(budget_s))
        except RpcError as error:
            self.metrics.request_refused(error.code.name, model=self._label(request.model), method="Embed")
            raise
        task = asyncio.create_task(work.run(self._admission))
        self._embeddings.add(task)
        task.add_done_callback(self._embeddings.discard)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is None or current.cancelling():
                raise
            raise unavailable("the gateway is shutting down") from None

    def model_name(self, name: str) -> str:
        """What a request's model means: the empty name is the default model's."""
        return name or self._model.name

    # -- text -------------------------------------------------------------------------------------------------------

    def models(self) -> list[inference_pb2.Model]:
        """The models served, the default one first; empty until a worker has described itself."""
        try:
            info = self.workers.reference
        except LookupError:
            return []
        return [
            inference_pb2.Model(
                name=self._model.name,
                family=info.family,
                max_context=self.workers.limits.max_context,
                vocab_size=info.vocab_size,
                digest=self._model.digest,
                dtype=info.dtype,
                chat=self._model.chat_template is not None and not self._model.embeds,
                kind=inference_pb2.MODEL_KIND_EMBEDS if self._model.embeds else inference_pb2.MODEL_KIND_GENERATES,
                dimensions=info.embedding_size,
            )
        ]

    async def tokenize(self, request: inference_pb2.TokenizeRequest) -> inference_pb2.TokenizeResponse:
        """Token ids of a text or a conversation, exactly as generate makes them."""
        check_model(request.model, self._model)
        token_ids, rendered = await tokenize_prompt(request, self._model, self._limits())
        return inference_pb2.TokenizeResponse(token_ids=token_ids, rendered=rendered)

    def detokenize(self, request: inference_pb2.DetokenizeRequest) -> inference_pb2.DetokenizeResponse:
        """The text of token ids."""
        check_model(request.model, self._model)
        limits = self._limits()
        if len(request.token_ids) > limits.max_context:
            raise invalid("token_ids", f"at most {limits.max_context} (the context), got {len(request.token_ids)}")
        check_token_ids("token_ids", request.token_ids, limits.vocab_size)
        text = self._model.tokenizer.decode(request.token_ids, keep_special_tokens=request.keep_special_tokens)
        return inference_pb2.DetokenizeResponse(text=text)

    # -- inside -----------------------------------------------------------------------------------------------------

    async def _begin(
        self, request: inference_pb2.GenerateRequest, budget: Budget, key: Key | None
    ) -> tuple[Record, asyncio.Task[None]]:
        """Starts a request, or finds the one that is kept under its key."""
        arrived_at = time.monotonic()
        if self._draining:
            raise unavailable("the gateway is shutting down")
        check_model(request.model, self._model)
        if self._model.embeds:
            raise mismatch("model", f"{self._model.name!r} turns texts into vectors and generates nothing; call Embed")
        check_labels(request)
        limits = self._limits()
        prompt, _ = await tokenize_prompt(request, self._model, limits)
        sampling = resolve_sampling(request.sampling, self._model.defaults, len(prompt), limits)
        fingerprint = request.SerializeToString(deterministic=True)
        if key is not None:
            if known := self._records.find(key, fingerprint):
                return known
            self._records.make_room()
        job = Job(
            request_id=request.request_id or secrets.token_hex(8),
            model=self._model.name,
            prompt=prompt,
            sampling=sampling,
            cache_salt=request.cache_salt,
            priority=request.priority,
            budget=budget,
            prefix=prefix_hashes(prompt, self.workers.layout.block_tokens, request.cache_salt),
        )
        outputs = [Output(i, self._model.tokenizer, sampling.stop, sampling.min_tokens) for i in range(sampling.n)]
        record = Record(job.request_id, outputs, sampling, keep=key is not None)
        journal = Journal(self.gateway_id, self._model.digest, len(prompt), self.metrics.token_gap, arrived_at)
        work = Request(job, journal, record, self.workers, self._config, self.metrics)
        task = self._start(work, record, key)
        if key is not None:
            self._records.add(key, fingerprint, record, task)
        return record, task

    async def _embedding(self, request: inference_pb2.EmbedRequest, budget: Budget) -> Embedding:
        """What runs a request for vectors, checked and tokenized."""
        arrived_at = time.monotonic()
        if self._draining:
            raise unavailable("the gateway is shutting down")
        check_model(request.model, self._model)
        if not self._model.embeds:
            raise mismatch("model", f"{self._model.name!r} generates tokens and makes no vectors; call Generate")
        limits = self._limits()
        job = await resolve_embedding(
            request, self._model, limits, self.workers.reference, budget, self._config.max_message_bytes
        )
        receipt = types_pb2.Receipt(gateway=self.gateway_id, model_digest=self._model.digest)
        return Embedding(job, receipt, arrived_at, self.workers, self._config, self.metrics)

    def _budget(self, budget_s: float | None) -> Budget:
        budget = Budget.of(self._config.default_deadline_s if budget_s is None else budget_s)
        if budget.total_s < _LEAST_BUDGET_S:
            raise budget.spent("before it arrived")
        return budget

    def _limits(self) -> Limits:
        try:
            return self.workers.limits
        except LookupError:
            raise unavailable("no worker is alive") from None

    def _label(self, model: str) -> str:
        """A metric's label takes names that are served, never a client's."""
        return self._model.name if model in ("", self._model.name) else ""

    def _start(self, work: Request, record: Record, key: Key | None) -> asyncio.Task[None]:
        task = asyncio.create_task(work.run(self._admission))
        self._tasks[task] = record

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.pop(task)
            if key is not None:
                self._records.ended(key)

        task.add_done_callback(ended)
        return task

    async def cancel(self) -> None:
        """Ends every request; their clients get UNAVAILABLE."""
        self._draining = True
        for task, record in self._tasks.items():
            record.fail(unavailable("the gateway is shutting down"))
            task.cancel()
        for embedding in self._embeddings:
            embedding.cancel()
        if self.num_requests:
            await asyncio.wait({*self._tasks, *self._embeddings})
