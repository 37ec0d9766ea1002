"""Stop strings: the first to be complete ends the text, however the text was cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.stop_strings import StopMatcher


def feed(stops: list[str], pieces: list[str]) -> tuple[list[str], str | None]:
    matcher = StopMatcher(stops)
    out = []
    for piece in pieces:
        text, match = matcher.push(piece)
        out.append(text)
        if match is not None:
            return out, match
    return [*out, matcher.finish()], None


def naive(stops: list[str], text: str) -> tuple[str, str | None]:
    """Every prefix in turn: the first that ends with a stop string, and of its stop strings the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4),
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
)
def test_equals_a_search_through_every_prefix(stops: list[str], pieces: list[str]) -> None:
    out, match = feed(stops, pieces)
    assert ("".join(out), match) == naive(stops, "".join(pieces))


def test_what_may_begin_a_stop_string_waits() -> None:
    assert feed(["END"], ["Hello E", "N", "d E", "ND!"]) == (["Hello ", "", "ENd ", ""], "END")
    assert feed(["END"], ["Hello E"]) == (["Hello ", "E"], None)


def test_no_stop_strings_hold_nothing_back() -> None:
    assert feed([], ["a", "b"]) == (["a", "b", ""], None)


@pytest.mark.parametrize("stops", [["bc", "abc"], ["abc", "bc"]])
def test_of_two_that_end_together_the_longer_one(stops: list[str]) -> None:
    assert feed(stops, ["xab", "cd"]) == (["x", ""], "abc")


def test_a_match_that_comes_too_early_is_passed_over() -> None:
    matcher = StopMatcher(["ab"])
    assert matcher.push("xab", may_stop=False) == ("xab", None)
    assert matcher.push("yab") == ("y", "ab")


def test_a_match_that_began_too_early_counts_where_it_ends() -> None:
    matcher = StopMatcher(["ab"])
    assert matcher.push("xa", may_stop=False) == ("x", None)
    assert matcher.push("b") == ("", "ab")
