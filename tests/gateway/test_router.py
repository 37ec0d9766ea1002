"""Routing: the least loaded, unless the prefix is elsewhere and that worker is not clearly busier."""

from __future__ import annotations

from gateway.router import MAX_PREFIX_BLOCKS, Candidate, Router, prefix_hashes

PROMPT = list(range(100))


def workers(**loads: float) -> list[Candidate]:
    return [Candidate(name, load) for name, load in loads.items()]


def test_hashes_stand_for_all_blocks_before_them() -> None:
    hashes = prefix_hashes(PROMPT, 16, "")
    assert len(hashes) == len(set(hashes)) == 6
    other = prefix_hashes([*PROMPT[:40], 7, *PROMPT[41:]], 16, "")
    assert [a == b for a, b in zip(hashes, other, strict=True)] == [True, True, False, False, False, False]
    assert prefix_hashes(PROMPT, 16, "salt")[0] != hashes[0]


def test_the_block_that_ends_the_prompt_does_not_count() -> None:
    assert [len(prefix_hashes(PROMPT[:n], 16, "")) for n in (1, 16, 17, 32, 33)] == [0, 0, 1, 1, 2]
    assert len(prefix_hashes(range(100_000), 16, "")) == MAX_PREFIX_BLOCKS


def test_the_least_loaded_is_taken() -> None:
    assert Router().choose(workers(a=3, b=1, c=2)) == "b"


def test_equals_take_turns() -> None:
    router = Router()
    assert sorted(router.choose(workers(a=0, b=0, c=0)) or "" for _ in range(3)) == ["a", "b", "c"]


def test_excluded_workers_are_not_taken() -> None:
    router = Router()
    assert router.choose(workers(a=0, b=9), excluded={"a"}) == "b"
    assert router.choose(workers(a=0), excluded={"a"}) is None
    assert router.choose([]) is None


def test_the_holder_of_the_prefix_is_taken_unless_it_is_clearly_busier() -> None:
    router = Router()
    prefix = prefix_hashes(PROMPT, 16, "")
    assert router.choose(workers(a=0, b=5), prefix, slack=2) == "a"
    assert router.choose(workers(a=2, b=0), prefix, slack=2) == "a"
    assert router.choose(workers(a=3, b=0), prefix, slack=2) == "b"
    # b holds it now
    assert router.choose(workers(a=0, b=1), prefix, slack=2) == "b"


def test_a_longer_match_is_worth_a_longer_wait() -> None:
    router = Router()
    prefix = prefix_hashes(PROMPT, 16, "")
    router.choose(workers(a=0), prefix[:2])
    assert router.choose(workers(a=33, b=0), prefix[:2], slack_per_block=16) == "b"
    router = Router()
    router.choose(workers(a=0), prefix)
    assert router.choose(workers(a=96, b=0), prefix, slack_per_block=16) == "a"


def test_the_longest_match_wins() -> None:
    router = Router()
    prefix = prefix_hashes(PROMPT, 16, "")
    router.choose(workers(a=0), prefix[:2])
    other = prefix_hashes([*PROMPT[:32], *range(500, 600)], 16, "")
    router.choose(workers(b=0), other)
    assert router.choose(workers(a=0, b=0), other, slack=1) == "b"


def test_an_excluded_or_departed_holder_leaves_the_choice_open() -> None:
    router = Router()
    prefix = prefix_hashes(PROMPT, 16, "")
    router.choose(workers(a=0), prefix)
    assert router.choose(workers(a=0, b=1), prefix, excluded={"a"}, slack=5) == "b"
    router.choose(workers(a=0), prefix)
    router.forget("a")
    assert router.choose(workers(a=1, b=0), prefix, slack=5) == "b"


def test_the_memory_of_prefixes_is_bounded_and_forgets_the_least_recent() -> None:
    router = Router(max_prefixes=12)
    old, hot, fresh = (prefix_hashes([seed, *PROMPT], 16, "") for seed in (1, 2, 3))
    router.choose(workers(a=0), old)
    router.choose(workers(a=0), hot)
    router.choose(workers(a=0), fresh)
    assert router.choose(workers(a=1, b=0), old, slack=5) == "b"
    router = Router(max_prefixes=12)
    router.choose(workers(a=0), old)
    router.choose(workers(a=0), hot)
    router.choose(workers(a=0), old)
    router.choose(workers(a=0), fresh)
    assert router.choose(workers(a=1, b=0), old, slack=5) == "a"
