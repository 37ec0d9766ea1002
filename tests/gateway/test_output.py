"""An output as it grows: every token once, text that adds up, stop strings across tokens, logprobs at their tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.v1 import types_pb2

from gateway.output import GapError, Output
from shared.tokenizer import Tokenizer
from tests import tiny_tokenizers

TOKENIZER = Tokenizer(tiny_tokenizers.byte_level())
SIZE = tiny_tokenizers.byte_level().get_vocab_size()
NOT_YET = types_pb2.FINISH_REASON_UNSPECIFIED
STOP = types_pb2.FINISH_REASON_STOP
LENGTH = types_pb2.FINISH_REASON_LENGTH


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def letters(text: str) -> list[int]:
    """A token for each byte, which is not how the tokenizer would cut the text."""
    return [token for byte in text for token in ids(byte)]


def grow(output: Output, token_ids: list[int], finish: types_pb2.FinishReason.ValueType = NOT_YET) -> int:
    return output.accept(len(output.token_ids), token_ids, [], finish)


def text(output: Output) -> str:
    return "".join(output.texts)


def test_text_follows_the_tokens() -> None:
    output = Output(0, TOKENIZER, [], 0)
    grow(output, ids("hello world"), LENGTH)
    assert (text(output), output.finish_reason) == ("hello world", LENGTH)
    assert len(output.texts) == len(output.token_ids)


def test_tokens_that_are_here_already_are_passed_over() -> None:
    output = Output(0, TOKENIZER, [], 0)
    one, two, three = letters("abc")
    assert output.accept(0, [one, two], [], NOT_YET) == 2
    assert output.accept(0, [one], [], NOT_YET) == 0
    assert output.accept(1, [two, three], [], LENGTH) == 1
    assert output.accept(1, [two, three], [], LENGTH) == 0
    assert (output.token_ids, text(output), output.done) == ([one, two, three], "abc", True)


def test_a_gap_is_refused() -> None:
    output = Output(0, TOKENIZER, [], 0)
    with pytest.raises(GapError, match="is at token 0, and got one for 1"):
        output.accept(1, [5], [], NOT_YET)


def test_a_stop_string_across_tokens_ends_the_text_before_it_and_the_tokens_with_it() -> None:
    output = Output(0, TOKENIZER, ["stop here"], 0)
    assert grow(output, letters("well, stop here, or not")) == len("well, stop here")
    assert (text(output), output.finish_reason, output.stop_match) == ("well, ", STOP, "stop here")
    assert output.token_ids == letters("well, stop here")
    assert grow(output, letters("more")) == 0


def test_a_stop_string_inside_one_token() -> None:
    output = Output(0, TOKENIZER, ["l"], 0)
    assert grow(output, ids("hello world")) == 1
    assert (text(output), output.stop_match) == ("he", "l")


def test_the_end_token_still_ends_an_output_that_has_stop_strings() -> None:
    output = Output(0, TOKENIZER, ["stop"], 0)
    grow(output, letters("a sto") + ids("<|end|>"), STOP)
    assert (text(output), output.finish_reason, output.stop_match) == ("a sto", STOP, None)
    assert output.token_ids[-1] == ids("<|end|>")[0]


def test_a_stop_token_is_no_part_of_the_text() -> None:
    output = Output(0, TOKENIZER, [], 0)
    grow(output, letters("ab"), STOP)
    assert (text(output), output.token_ids) == ("a", letters("ab"))


def test_stop_strings_wait_for_min_tokens() -> None:
    output = Output(0, TOKENIZER, ["a"], 3)
    grow(output, letters("aabab"))
    assert (text(output), output.stop_match, output.token_ids) == ("aab", "a", letters("aaba"))


def test_bytes_that_never_became_a_character_are_shown_at_the_end() -> None:
    rocket = [token for token in letters("🚀") if token]
    output = Output(0, TOKENIZER, [], 0)
    grow(output, rocket[:-1], LENGTH)
    assert output.texts == ["", "", "\ufffd"][-len(rocket) + 1 :]


def test_logprobs_stand_beside_their_tokens_with_their_texts() -> None:
    output = Output(0, TOKENIZER, [], 0)
    tokens = letters("abc")
    logprobs = [
        types_pb2.PositionLogprobs(
            chosen=types_pb2.TokenLogprob(token_id=token, logprob=-1.0),
            top=[types_pb2.TokenLogprob(token_id=ids(" hello")[0], logprob=-0.5)],
        )
        for token in tokens
    ]
    output.accept(0, tokens[:1], logprobs[:1], NOT_YET)
    output.accept(0, tokens, logprobs, LENGTH)
    assert [position.chosen.text for position in output.logprobs] == ["a", "b", "c"]
    assert {position.top[0].text for position in output.logprobs} == {" hello"}
    assert [position.chosen.text for position in output.chunk(1, 9).logprobs] == ["b", "c"]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_cut_into_chunks_adds_up(data: st.DataObject) -> None:
    token_ids = data.draw(st.lists(st.integers(0, SIZE + 2), min_size=1, max_size=30))
    stops = data.draw(st.lists(st.text("ehlo w", min_size=1, max_size=4), max_size=2))
    output = Output(0, TOKENIZER, stops, 0)
    for start in range(0, len(token_ids), 7):
        last = start + 7 >= len(token_ids)
        output.accept(start, token_ids[start : start + 7], [], LENGTH if last else NOT_YET)
    assert output.done
    position, read_ids, read_text = 0, [], ""
    while position < len(output.token_ids):
        chunk = output.chunk(position, data.draw(st.integers(1, 9)))
        assert chunk.position == position
        assert bool(chunk.finish_reason) == (position + len(chunk.token_ids) == len(output.token_ids))
        read_ids += chunk.token_ids
        read_text += chunk.text
        position += len(chunk.token_ids)
    assert (read_ids, read_text) == (output.token_ids, text(output))
    full = TOKENIZER.decode(output.token_ids)
    if output.stop_match is None:
        assert read_text == full
    else:
        assert full.startswith(read_text + output.stop_match)


def test_what_was_delivered_can_be_forgotten() -> None:
    output = Output(0, TOKENIZER, [], 0)
    grow(output, letters("abcdef"), LENGTH)
    output.forget(4)
    output.forget(2)
    assert output.chunk(4, 9).text == "ef"
    assert output.chunk(4, 9).token_ids == letters("ef")
    with pytest.raises(IndexError, match="kept from position 4, not 3"):
        output.chunk(3, 9)
