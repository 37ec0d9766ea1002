import asyncio

import grpc
import pytest
from tandem.v1 import decode_pb2

from decode_worker.group import Finish, NewToken, NewTokens
from decode_worker.outbox import Outbox
from shared.logprobs import TokenLogprobs
from shared.rpc import RpcError, stale
from shared.sampling import Sampled


def tokens(position: int, *outputs: int, attempt: int = 1, finish: Finish = None) -> NewTokens:
    new = [NewToken(index, position, Sampled(100 * index + position, -0.5), finish) for index in outputs]
    reports = [TokenLogprobs(9, -1.0, ())] if position == 0 else []
    return NewTokens(attempt, new, preemptions=position, cached_tokens=16, prompt_logprobs=reports)


async def drain(outbox: Outbox) -> list[decode_pb2.DecodeResponse]:
    outbox.end()
    return [message async for message in outbox.messages()]


async def test_a_step_is_a_message_while_the_reader_keeps_up() -> None:
    outbox = Outbox()
    stream = outbox.messages()
    for position in range(3):
        outbox.put_tokens(tokens(position, 0))
        message = await anext(stream)
        assert [(o.position, list(o.token_ids)) for o in message.tokens.outputs] == [(position, [position])]


async def test_what_a_slow_reader_has_not_taken_comes_in_one_message() -> None:
    outbox = Outbox()
    outbox.put(decode_pb2.DecodeResponse(imported=decode_pb2.Imported(attempt=1)))
    outbox.put_tokens(tokens(0, 0, 1))
    outbox.put_tokens(tokens(1, 0, 1))
    outbox.put_tokens(tokens(2, 0, finish="length"))
    imported, message = await drain(outbox)
    assert imported.HasField("imported")
    first, second = message.tokens.outputs
    assert (first.index, first.position, list(first.token_ids), first.finish_reason) == (0, 0, [0, 1, 2], 2)
    assert (second.index, second.position, list(second.token_ids), second.finish_reason) == (1, 0, [100, 101], 0)
    assert [len(output.logprobs) for output in message.tokens.outputs] == [3, 2]
    assert len(message.tokens.prompt_logprobs) == 1
    assert (message.tokens.preemptions, message.tokens.cached_tokens, message.tokens.attempt) == (2, 16, 1)


async def test_a_message_that_was_taken_gets_nothing_added() -> None:
    outbox = Outbox()
    outbox.put_tokens(tokens(0, 0))
    stream = outbox.messages()
    taken = await anext(stream)
    outbox.put_tokens(tokens(1, 0))
    assert list(taken.tokens.outputs[0].token_ids) == [0]
    assert (await anext(stream)).tokens.outputs[0].position == 1


async def test_a_void_attempt_leaves_only_the_reservation() -> None:
    outbox = Outbox()
    outbox.put(decode_pb2.DecodeResponse(reserved=decode_pb2.Reserved(held_tokens=16)))
    outbox.put(decode_pb2.DecodeResponse(imported=decode_pb2.Imported(attempt=1)))
    outbox.put_tokens(tokens(0, 0))
    outbox.void()
    outbox.put_tokens(tokens(0, 0, attempt=2))
    reserved, message = await drain(outbox)
    assert reserved.HasField("reserved")
    assert message.tokens.attempt == 2


async def test_an_error_comes_after_what_was_there_and_wakes_the_reader() -> None:
    outbox = Outbox()
    stream = outbox.messages()
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    outbox.put_tokens(tokens(0, 0))
    outbox.fail(stale("first"))
    outbox.fail(stale("second"))
    assert (await waiting).HasField("tokens")
    with pytest.raises(RpcError, match="first") as error:
        await anext(stream)
    assert error.value.code == grpc.StatusCode.ABORTED
