"""Stop strings in a text that arrives in pieces.

    matcher = StopMatcher(["\\n\\n", "END"])
    text, match = matcher.push("Hello E")  # ("Hello ", None): "E" may begin "END"

The stop string that is complete first wins, and of several that end with the same character the longest: this does not
depend on how the text was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Holds back what may be the beginning of a stop string, and ends the text before the first match.

    One Knuth-Morris-Pratt automaton per stop string: a character costs the same whatever came before.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _failure_table(stop)) for stop in stops]
        self._states = [0] * len(stops)  # characters of each stop string that the text's end matches
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """The text that is certain now, and the stop string that ended it.

        may_stop: False while an output is too short to end; matches within this piece are passed over.
        """
        if not self._stops:
            return text, None
        self._held += text
        start = len(self._held) - len(text)
        for i, character in enumerate(text):
            match = self._step(character)
            if match is not None and may_stop:
                certain, self._held = self._held[: start + i + 1 - len(match)], ""
                return certain, match
        keep = max(self._states)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain, None

    def finish(self) -> str:
        """What was held back, when nothing follows."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> str | None:
        longest: str | None = None
        for i, (stop, failure) in enumerate(self._stops):
            state = self._states[i]
            while state and stop[state] != character:
                state = failure[state - 1]
            if stop[state] == character:
                state += 1
            if state == len(stop):
                if longest is None or len(stop) > len(longest):
                    longest = stop
                state = failure[state - 1]
            self._states[i] = state
        return longest


def _failure_table(stop: str) -> list[int]:
    """For each prefix, the length of its longest proper suffix that is a prefix of `stop`."""
    table = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = table[length - 1]
        if stop[i] == stop[length]:
            length += 1
        table[i] = length
    return table
