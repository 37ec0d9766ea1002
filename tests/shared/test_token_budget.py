from hypothesis import given
from hypothesis import strategies as st

from shared.token_budget import Demand, share_budget

DEMANDS = st.lists(
    st.builds(Demand, st.integers(-2, 2), st.integers(0, 50), st.integers(1, 2000)),
    max_size=20,
    unique_by=lambda demand: demand.arrival,
)


def steps_until_done(prompts: list[int], batch_tokens: int, chunk_tokens: int) -> list[int]:
    """The step in which each prompt, in order of arrival, is done; all of one priority."""
    remaining = dict(enumerate(prompts))
    done: dict[int, int] = {}
    step = 0
    while remaining:
        step += 1
        demands = [Demand(0, arrival, tokens) for arrival, tokens in remaining.items()]
        for demand, share in zip(demands, share_budget(demands, batch_tokens, chunk_tokens), strict=True):
            remaining[demand.arrival] -= share
            if not remaining[demand.arrival]:
                del remaining[demand.arrival]
                done[demand.arrival] = step
    return [done[arrival] for arrival in range(len(prompts))]


@given(DEMANDS, st.integers(1, 600), st.integers(1, 600))
def test_shares_are_within_their_bounds_and_leave_nothing_over(
    demands: list[Demand], batch_tokens: int, chunk_tokens: int
) -> None:
    shares = share_budget(demands, batch_tokens, chunk_tokens)
    wishes = [min(demand.remaining_tokens, chunk_tokens) for demand in demands]
    assert all(0 <= share <= wish for share, wish in zip(shares, wishes, strict=True))
    assert sum(shares) == min(batch_tokens, sum(wishes))


@given(DEMANDS, st.integers(1, 600), st.integers(1, 600))
def test_a_lower_priority_gets_only_what_higher_ones_leave(
    demands: list[Demand], batch_tokens: int, chunk_tokens: int
) -> None:
    shares = share_budget(demands, batch_tokens, chunk_tokens)
    for low, low_share in zip(demands, shares, strict=True):
        for high, share in zip(demands, shares, strict=True):
            if high.priority > low.priority and low_share:
                assert share == min(high.remaining_tokens, chunk_tokens)


@given(DEMANDS.filter(bool), st.integers(1, 600), st.integers(1, 600))
def test_the_first_of_the_highest_priority_gets_half(
    demands: list[Demand], batch_tokens: int, chunk_tokens: int
) -> None:
    shares = share_budget(demands, batch_tokens, chunk_tokens)
    first = min(range(len(demands)), key=lambda i: (-demands[i].priority, demands[i].arrival))
    wish = min(demands[first].remaining_tokens, chunk_tokens)
    assert shares[first] >= min(wish, -(-batch_tokens // 2))


def test_a_prompt_alone_gets_whole_chunks() -> None:
    assert share_budget([Demand(0, 1, 2000)], 512, 512) == [512]
    assert share_budget([Demand(0, 1, 2000)], 512, 256) == [256]


def test_a_short_prompt_is_done_at_once_behind_a_long_one() -> None:
    done = steps_until_done([100_000, 32], batch_tokens=512, chunk_tokens=512)
    assert done[1] == 1


def test_the_wait_of_a_short_prompt_does_not_grow_with_the_long_ones_before_it() -> None:
    for length in (1_000, 10_000, 100_000):
        assert steps_until_done([length] * 5 + [32], batch_tokens=512, chunk_tokens=512)[-1] == 1


def test_a_long_prompt_is_at_most_half_as_fast_behind_endless_short_ones() -> None:
    long, step = 10_240, 0
    while long:
        step += 1
        demands = [Demand(0, 0, long), *(Demand(0, 100 * step + i, 64) for i in range(16))]
        long -= share_budget(demands, 512, 512)[0]
    assert step == 10_240 // 256


def test_equal_prompts_are_done_one_after_the_other() -> None:
    assert steps_until_done([512] * 6, batch_tokens=512, chunk_tokens=512) == [1, 2, 3, 4, 5, 6]
    assert steps_until_done([1_500] * 3, batch_tokens=512, chunk_tokens=512) == [3, 6, 9]
