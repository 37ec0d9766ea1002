"""A leg: outputs that share a token history, on one decode worker, fed by one prefill worker at a time.

    admit ▸ reserved ▸ prefill: extents ▸ first tokens ▸ begin ▸ imported ▸ tokens …

The Decode stream holds the reservation, the Prefill stream the export: leaving this file ends both, however it is left.
A prefill that fails before `imported` is done again elsewhere, under the next attempt number; a decode that fails ends
the leg with DecodeFailed, and the request goes on with new legs.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tandem.v1 import decode_pb2, prefill_pb2, types_pb2

from gateway.failure import DecodeFailed, PrefillFailed, WorkerFailed, read, write
from gateway.job import Job
from gateway.journal import Journal
from gateway.output import GapError, Output
from gateway.record import Record
from gateway.worker import Worker
from gateway.workers import Workers
from shared.rpc import RpcError, unavailable

log = logging.getLogger(__name__)

_numbers = itertools.count()


def out_of_attempts(attempts: int, last: WorkerFailed) -> RpcError:
    """UNAVAILABLE: as many handoffs failed as the configuration allows."""
    return unavailable(f"the request was handed over {attempts} times without success, at last: {last.error.message}")


class Leg:
    """One Decode stream's life.

    attempt: number of the last handoff of this chain of legs. local_tokens: up to so many tokens that decode does not
    hold are computed there. progressed: called after outputs got tokens.
    """

    def __init__(
        self,
        job: Job,
        journal: Journal,
        record: Record,
        workers: Workers,
        outputs: Sequence[Output],
        decode: Worker,
        *,
        attempt: int,
        max_attempts: int,
        local_tokens: int,
        progressed: Callable[[], None],
    ) -> None:
        self.attempt = attempt
        self.reserved = False
        self._job, self._journal, self._record, self._workers = job, journal, record, workers
        self._outputs = {output.index: output for output in outputs}
        self._decode, self._decode_id = decode, decode.worker_id
        self._max_attempts, self._local_tokens = max_attempts, local_tokens
        self._progressed = progressed
        self._number = next(_numbers)
        self._base = len(outputs[0].token_ids)  # position of the leg's first token in each output
        self._admit = job.admit(outputs)
        self._imported = asyncio.Event()

    @property
    def _done(self) -> bool:
        return all(output.done for output in self._outputs.values())

    async def run(self) -> None:
        """Generates until every output of the leg is done. Raises DecodeFailed; RpcError if nothing is left to try."""
        call: Any = self._decode.decode.Decode(timeout=self._job.budget.left_s, metadata=self._decode.metadata)
        try:
            with self._decode.held(), self._decode.working(1):
                await write(call, decode_pb2.DecodeRequest(admit=self._admit))
                first: decode_pb2.DecodeResponse = await read(call, self._decode_id, DecodeFailed)
                if first.WhichOneof("event") != "reserved":
                    raise self._broken("it sent something else before its reservation")
                self.reserved = True
                self._journal.reserved()
                await self._generate(call, first.reserved.held_tokens)
        finally:
            call.cancel()

    async def _generate(self, call: Any, held_tokens: int) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                receiving = group.create_task(self._receive(call))
                await self._hand_over(call, held_tokens)
                if self._done:
                    receiving.cancel()
        except BaseExceptionGroup as errors:
            # when decode is gone, what its loss did to the handoff is of no interest
            lost = [error for error in errors.exceptions if isinstance(error, DecodeFailed)]
            raise [*lost, *errors.exceptions][0] from None

    # -- prefill side -----------------------------------------------------------------------------------------------

    async def _hand_over(self, call: Any, held_tokens: int) -> None:
        """Returns when decode has what it needs. One handoff after another until one succeeds."""
        failed: dict[str, PrefillFailed] = {}
        while True:
            self.attempt += 1
            prefill = self._choose_prefill(held_tokens, failed)
            self._journal.handing_over(local=prefill is None)
            if prefill is None:
                begin = decode_pb2.Begin(attempt=self.attempt, local_prefill=True)
                await write(call, decode_pb2.DecodeRequest(begin=begin))
                return
            try:
                await self._prefill(call, prefill, held_tokens)
                return
            except PrefillFailed as failure:
                if not failure.recoverable:
                    raise failure.error from None
                log.warning("request %s: prefill failed, attempt %d: %s", self._job.request_id, self.attempt, failure)
                failed[failure.worker_id] = failure
                if self.attempt >= self._max_attempts:
                    raise out_of_attempts(self.attempt, failure) from None

    def _choose_prefill(self, held_tokens: int, failed: dict[str, PrefillFailed]) -> Worker | None:
        """None: decode computes the prompt itself."""
        if len(self._admit.token_ids) - held_tokens <= self._local_tokens:
            return None
        prefill = self._workers.choose_prefill(self._job.prefix, failed, self._decode_id)
        if prefill is None:
            full = [failure for failure in failed.values() if failure.full]
            if full:
                raise full[-1].error
        return prefill

    async def _prefill(self, call: Any, worker: Worker, held_tokens: int) -> None:
        worker_id, attempt = worker.worker_id, self.attempt
        with worker.held():
            stream: Any = worker.prefill.Prefill(
                self._job.prefill(self._admit, attempt, held_tokens),
                timeout=self._job.budget.left_s,
                metadata=worker.metadata,
            )
            try:
                with worker.working(len(self._admit.token_ids)):
                    first = await self._forward_extents(call, stream, worker_id, attempt)
                self._take_first(first, worker_id)
                if self._done:
                    return
                begin = decode_pb2.Begin(attempt=attempt, first_tokens=self._going_on(first.tokens))
                await write(call, decode_pb2.DecodeRequest(begin=begin))
                await self._until_imported(stream, worker_id)
            finally:
                stream.cancel()

    async def _forward_extents(self, call: Any, stream: Any, worker_id: str, attempt: int) -> prefill_pb2.FirstTokens:
        # an output of one token needs no blocks anywhere
        wanted = self._job.sampling.max_tokens > self._base + 1
        while True:
            message: prefill_pb2.PrefillResponse = await read(stream, worker_id, PrefillFailed)
            kind = message.WhichOneof("event")
            if kind == "first_tokens":
                return message.first_tokens
            if kind != "extent":
                raise PrefillFailed(worker_id, unavailable("it sent an empty message"))
            if wanted:
                blocks = decode_pb2.ImportBlocks(attempt=attempt, extent=message.extent)
                await write(call, decode_pb2.DecodeRequest(import_blocks=blocks))

    def _take_first(self, first: prefill_pb2.FirstTokens, worker_id: str) -> None:
        if {token.index for token in first.tokens} != self._outputs.keys():
            raise PrefillFailed(worker_id, unavailable("it sent first tokens of other outputs than it was asked for"))
        self._journal.prefilled(worker_id, first.cached_tokens)
        self._take_prompt_logprobs(first.prompt_logprobs)
        for token in first.tokens:
            logprobs = [token.logprobs] if token.HasField("logprobs") else []
            self._accept(token.index, self._base, [token.token_id], logprobs, token.finish_reason)
        self._progressed()

    def _going_on(self, tokens: Iterable[prefill_pb2.FirstToken]) -> list[prefill_pb2.FirstToken]:
        """The first tokens that decode continues: as the client has them, should a second prefill differ."""
        going_on = []
        for token in tokens:
            output = self._outputs[token.index]
            if output.done:
                continue
            sent = output.token_ids[self._base]
            if sent != token.token_id:
                log.error(
                    "request %s: output %d began with token %d, and a second prefill says %d",
                    self._job.request_id,
                    token.index,
                    sent,
                    token.token_id,
                )
            going_on.append(prefill_pb2.FirstToken(index=token.index, token_id=sent))
        return going_on

    async def _until_imported(self, stream: Any, worker_id: str) -> None:
        """The export must live until decode has it: a prefill that ends before that has failed."""
        imported = asyncio.create_task(self._imported.wait())
        ended = asyncio.create_task(read(stream, worker_id, PrefillFailed))
        try:
            await asyncio.wait({imported, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not imported.done():
                ended.result()
                raise PrefillFailed(worker_id, unavailable("it sent more after its first tokens"))
        finally:
            imported.cancel()
            ended.cancel()
            await asyncio.gather(imported, ended, return_exceptions=True)

    # -- decode side ------------------------------------------------------------------------------------------------

    async def _receive(self, call: Any) -> None:
        while not self._done:
            message: decode_pb2.DecodeResponse = await read(call, self._decode_id, DecodeFailed)
            kind = message.WhichOneof("event")
            if kind == "imported":
                # one of an older attempt is void
                if message.imported.attempt == self.attempt:
                    self._journal.imported(message.imported)
                    self._imported.set()
            elif kind == "tokens":
                if message.tokens.attempt == self.attempt:
                    await self._take_tokens(call, message.tokens)
            else:
                raise self._broken("it sent a second reservation, or an empty message")
        self._imported.set()

    async def _take_tokens(self, call: Any, tokens: decode_pb2.Tokens) -> None:
        self._journal.decoded(self._number, self._decode_id, tokens.preemptions)
        self._journal.found_cached(tokens.cached_tokens)
        self._take_prompt_logprobs(tokens.prompt_logprobs)
        stopped: list[int] = []
        for new in tokens.outputs:
            if new.index not in self._outputs:
                raise self._broken(f"it sent tokens of output {new.index}, which it was not asked for")
            output = self._outputs[new.index]
            if output.done:
                continue
            try:
                self._accept(new.index, new.position, new.token_ids, new.logprobs, new.finish_reason)
            except GapError as gap:
                raise self._broken(str(gap)) from None
            if output.done and not new.finish_reason:
                stopped.append(new.index)
        self._progressed()
        if stopped and not self._done:
            finish = decode_pb2.Finish(output_indices=stopped)
            await write(call, decode_pb2.DecodeRequest(finish=finish))
        if self._imported.is_set():
            # before that, waiting here would keep the prefill worker's blocks
            await self._record.room()

    def _accept(
        self,
        index: int,
        position: int,
        token_ids: Sequence[int],
        logprobs: Sequence[types_pb2.PositionLogprobs],
        finish_reason: types_pb2.FinishReason.ValueType,
    ) -> None:
        if len(logprobs) != (len(token_ids) if self._job.sampling.HasField("logprobs") else 0):
            raise self._broken(f"it sent {len(token_ids)} tokens with {len(logprobs)} logprobs")
        if self._outputs[index].accept(position, token_ids, logprobs, finish_reason):
            self._journal.produced(index)

    def _take_prompt_logprobs(self, logprobs: Sequence[types_pb2.PositionLogprobs]) -> None:
        if logprobs and not self._record.prompt_logprobs:
            for position in logprobs:
                next(iter(self._outputs.values())).name_tokens(position)
            self._record.prompt_logprobs = list(logprobs)

    def _broken(self, what: str) -> WorkerFailed:
        log.error("request %s: %s broke the contract: %s", self._job.request_id, self._decode, what)
        return DecodeFailed(self._decode_id, unavailable(f"the decode worker broke the contract: {what}"))
