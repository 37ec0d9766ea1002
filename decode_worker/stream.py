"""One Decode stream: what the gateway sends, step by step, and what becomes of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial

import grpc
from tandem.v1 import decode_pb2, prefill_pb2

from decode_worker.group import Ended, Event, Failed, Group, NewTokens, Reserved
from decode_worker.import_attempt import ImportAttempt
from decode_worker.outbox import Outbox
from decode_worker.scheduler import DecodeScheduler
from shared.engine_thread import EngineThread
from shared.rpc import RpcError, internal, invalid, stale
from shared.token_request import Limits, TokenRequest, read_token_request
from shared.transport.importer import Importer

# A copy fails when the prefill worker dies. The gateway sees that too, and hands over again under the same reservation:
# only when it does not, as when nobody but this worker cannot reach the other, does the stream fail.
IMPORT_GRACE_S = 0.5
# Another attempt would end as this one did.
HOPELESS = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL)


class DecodeStream:
    """Reads one request's messages and drives its group; replies go to `outbox`."""

    def __init__(
        self, scheduler: DecodeScheduler, thread: EngineThread, importer: Importer, limits: Limits, worker_id: str
    ) -> None:
        self.outbox = Outbox()
        self._scheduler = scheduler
        self._thread = thread
        self._importer = importer
        self._limits = limits
        self._worker_id = worker_id
        self._group: Group | None = None
        self._attempt: ImportAttempt | None = None
        self._running = False  # the group was told to begin
        self._held_tokens: int | None = None
        self._reserved: asyncio.Future[Reserved] = asyncio.get_running_loop().create_future()
        self._first_tokens: list[tuple[int, int]] | None = None
        self._grace: asyncio.TimerHandle | None = None

    async def read(self, requests: AsyncIterator[decode_pb2.DecodeRequest]) -> None:
        """Handles messages in order until the gateway sends no more; an error ends the stream."""
        try:
            async for request in requests:
                await self._handle(request)
            if self._attempt is None or not self._attempt.begun:
                raise invalid("event", "no more messages follow, and begin was not among them")
        except RpcError as error:
            self.outbox.fail(error)
        except (grpc.aio.UsageError, grpc.aio.AbortError):
            pass  # the call is over
        except Exception as error:
            self.outbox.fail(internal(error))

    async def close(self) -> None:
        """Frees what the stream holds, once no copy writes to it any more."""
        if self._attempt is not None:
            await self._attempt.cancel()
        if self._grace is not None:
            self._grace.cancel()
        if self._group is not None:
            self._thread.post(partial(self._scheduler.release, self._group))

    # -- messages of the gateway ------------------------------------------------------------------------------------

    async def _handle(self, request: decode_pb2.DecodeRequest) -> None:
        kind = request.WhichOneof("event")
        if kind is None:
            raise invalid("event", "is unset")
        if (self._group is None) != (kind == "admit"):
            raise invalid(kind, "admit comes first, and once")
        if kind == "admit":
            self._admit(request.admit)
        elif kind == "import_blocks":
            await self._import_blocks(request.import_blocks)
        elif kind == "begin":
            await self._begin(request.begin)
        else:
            self._finish(request.finish)

    def _admit(self, message: decode_pb2.Admit) -> None:
        work = read_token_request(message, self._limits, "admit.")
        self._check_capacity(work)
        self._group = Group(work, self._receive, time.monotonic())
        self._thread.post(partial(self._scheduler.submit, self._group))

    async def _import_blocks(self, message: decode_pb2.ImportBlocks) -> None:
        attempt = await self._enter_attempt("import_blocks.attempt", message.attempt)
        if attempt is None:
            return
        if attempt.begun:
            raise invalid("import_blocks", f"attempt {attempt.number} has begun; no more blocks can follow")
        extent, num_tokens = message.extent, len(self._request.token_ids)
        # where the prefill worker's blocks are larger than ours, its first begins with tokens that are held here
        if extent.first_token > attempt.covered_tokens:
            raise invalid(
                "import_blocks.extent.first_token",
                f"tokens up to {attempt.covered_tokens} are there; the next extent starts with that one or before, "
                f"got {extent.first_token}",
            )
        missing = attempt.covered_tokens - extent.first_token
        if not missing < extent.num_tokens <= num_tokens - extent.first_token:
            raise invalid(
                "import_blocks.extent.num_tokens",
                f"must lie in [{missing + 1}, {num_tokens - extent.first_token}], got {extent.num_tokens}",
            )
        attempt.add(extent)

    async def _begin(self, message: decode_pb2.Begin) -> None:
        attempt = await self._enter_attempt("begin.attempt", message.attempt)
        if attempt is None:
            return
        if attempt.begun:
            raise invalid("begin", f"attempt {attempt.number} has begun already")
        if message.local_prefill or not message.first_tokens:
            if message.first_tokens or attempt.covered_tokens != self._held_tokens:
                raise invalid("begin.local_prefill", "neither first tokens nor blocks go with a prompt computed here")
            self._first_tokens = None
        else:
            if attempt.covered_tokens != len(self._request.token_ids):
                raise invalid(
                    "begin",
                    f"the blocks of {len(self._request.token_ids)} tokens are needed, those up to "
                    f"{attempt.covered_tokens} were sent",
                )
            self._first_tokens = self._read_first_tokens(message.first_tokens)
        attempt.finish()

    def _read_first_tokens(self, tokens: Sequence[prefill_pb2.FirstToken]) -> list[tuple[int, int]]:
        indices = [token.index for token in tokens]
        self._check_outputs("begin.first_tokens", indices)
        if len(set(indices)) != len(indices):
            raise invalid("begin.first_tokens", "names an output twice")
        vocab_size = self._limits.vocab_size
        if (largest := max(token.token_id for token in tokens)) >= vocab_size:
            raise invalid("begin.first_tokens", f"token {largest} is outside the vocabulary of {vocab_size}")
        return [(token.index, token.token_id) for token in tokens if not token.finish_reason]

    def _finish(self, message: decode_pb2.Finish) -> None:
        self._check_outputs("finish.output_indices", message.output_indices)
        if self._group is not None:
            self._thread.post(partial(self._scheduler.finish, self._group, tuple(message.output_indices)))

    def _check_outputs(self, field: str, indices: Iterable[int]) -> None:
        unknown = set(indices) - set(self._request.output_indices)
        if unknown:
            raise invalid(field, f"output {min(unknown)} is not one of admit.output_indices")

    def _check_capacity(self, work: TokenRequest) -> None:
        """What passes here fits the pool when it is alone, each output at its longest."""
        block_tokens, capacity = self._limits.block_tokens, self._limits.num_blocks
        prompt = -(-len(work.token_ids) // block_tokens)
        # the last token's KV is never computed
        longest = -(-(work.total_tokens - 1) // block_tokens)
        if prompt > capacity:
            what = f"{len(work.token_ids)} tokens take {prompt} blocks"
            raise invalid("admit.token_ids", f"{what} and this worker's pool has {capacity}")
        if longest > capacity:
            fitting = capacity * block_tokens + 1 - work.num_prompt_tokens
            raise invalid(
                "admit.sampling.max_tokens",
                f"{work.num_prompt_tokens} prompt tokens and {work.params.max_tokens} more take {longest} blocks and "
                f"this worker's pool has {capacity}; at most {fitting} tokens fit",
            )
        if prompt + len(work.output_indices) - 1 > capacity:
            what = f"{len(work.output_indices)} outputs of {len(work.token_ids)} tokens"
            raise invalid("admit.output_indices", f"{what} do not fit the {capacity} blocks of this worker's pool")

    # -- attempts ---------------------------------------------------------------------------------------------------

    async def _enter_attempt(self, field: str, number: int) -> ImportAttempt | None:
        """The attempt of that number, which voids those below it; None for one that is void itself."""
        if self._held_tokens is None:
            raise invalid(field.partition(".")[0], "comes after the reservation")
        current = self._attempt.number if self._attempt else 0
        if number < 1:
            raise invalid(field, "is counted from 1")
        if number < current:
            return None
        if number > current:
            await self._void()
            if self.outbox.ended:
                raise stale(f"attempt {current} came to its end before it was voided")
            self._attempt = ImportAttempt(number, self._importer, self._reserved, self._held_tokens)
            self._attempt.start(self._imported, self._import_failed)
        return self._attempt

    async def _void(self) -> None:
        if self._attempt is not None:
            await self._attempt.cancel()
            self.outbox.void()
        # after the attempt, whose end may have been a failure that set it
        if self._grace is not None:
            self._grace.cancel()
        if self._running and self._group is not None:
            self._running = False
            self._reserved = asyncio.get_running_loop().create_future()
            self._thread.post(partial(self._scheduler.void, self._group))

    def _imported(self) -> None:
        attempt = self._attempt
        if attempt is None or self._group is None:
            return
        if self._first_tokens is not None:
            imported = decode_pb2.Imported(
                attempt=attempt.number,
                handoff_bytes=attempt.num_bytes,
                handoff_s=attempt.seconds,
                transport=attempt.transport,
                refusals=attempt.refusals,
            )
            self.outbox.put(decode_pb2.DecodeResponse(imported=imported))
        self._running = True
        self._thread.post(partial(self._scheduler.begin, self._group, attempt.number, self._first_tokens))

    def _import_failed(self, error: Exception) -> None:
        failure = error if isinstance(error, RpcError) else internal(error)
        if failure.code in HOPELESS:
            self.outbox.fail(failure)
        else:
            self._grace = asyncio.get_running_loop().call_later(IMPORT_GRACE_S, self.outbox.fail, failure)

    # -- events of the engine ---------------------------------------------------------------------------------------

    def _receive(self, event: Event) -> None:
        match event:
            case Reserved(held_tokens=held_tokens, queue_s=queue_s):
                if self._held_tokens is None:  # the gateway is told once; a voided attempt takes its place again
                    reserved = decode_pb2.Reserved(held_tokens=held_tokens, queue_s=queue_s, worker_id=self._worker_id)
                    self.outbox.put(decode_pb2.DecodeResponse(reserved=reserved))
                self._held_tokens = held_tokens
                self._reserved.set_result(event)
            case NewTokens(attempt):
                if self._is_current(attempt):
                    self.outbox.put_tokens(event)
            case Ended(attempt):
                if self._is_current(attempt):
                    self.outbox.end()
                else:
                    self.outbox.fail(stale(f"attempt {attempt} came to its end before it was voided"))
            case Failed(error):
                self.outbox.fail(error)

    def _is_current(self, attempt: int) -> bool:
        return attempt == (self._attempt.number if self._attempt and self._running else 0)

    @property
    def _request(self) -> TokenRequest:
        if self._group is None:
            raise invalid("admit", "comes first")
        return self._group.request
