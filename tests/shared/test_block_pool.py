import random
from collections import Counter

import pytest

from shared.block_pool import BlockPool, OutOfBlocks


def make_pool(num_blocks: int = 9, block_tokens: int = 4, prefix_cache: bool = True, model: str = "m") -> BlockPool:
    return BlockPool(num_blocks, block_tokens, prefix_cache=prefix_cache, model_digest=model)


def run(pool: BlockPool, tokens: list[int], salt: str = "") -> list[int]:
    """A finished prompt: blocks in the cache, held by nobody."""
    blocks = pool.allocate(-(-len(tokens) // pool.block_tokens))
    pool.commit(tokens, blocks, salt, len(tokens))
    pool.free(blocks)
    return blocks


def test_matches_full_blocks_only_and_up_to_max_tokens():
    pool = make_pool()
    tokens = list(range(14))
    blocks = run(pool, tokens)
    for max_tokens, found in [(14, 3), (13, 3), (12, 3), (11, 2), (8, 2), (7, 1), (4, 1), (3, 0), (0, 0), (-1, 0)]:
        matched = pool.match(tokens, "", max_tokens)
        assert matched == blocks[:found]
        pool.free(matched)
    assert pool.match([*tokens[:9], 99, *tokens[10:]], "", 14) == blocks[:2]


def test_a_full_hit_leaves_the_last_token_to_compute_at_block_edges():
    pool = make_pool()
    for length in (4, 8, 12):
        tokens = list(range(length))
        run(pool, tokens)
        matched = pool.match(tokens, "", length - 1)
        assert len(matched) == length // 4 - 1
        pool.free(matched)


def test_salt_and_model_keep_prefixes_apart():
    pool = make_pool()
    run(pool, list(range(8)), salt="alice")
    assert pool.match(list(range(8)), "bob", 8) == []
    assert pool.match(list(range(8)), "", 8) == []
    assert len(pool.match(list(range(8)), "alice", 8)) == 2
    # the digest of a model and a salt is not that of another split of the same text
    assert make_pool(model="ab")._seed("c") != make_pool(model="a")._seed("bc")


def test_equal_tokens_after_different_prefixes_are_different_blocks():
    pool = make_pool()
    run(pool, [1, 1, 1, 1, 7, 7, 7, 7])
    assert pool.match([7, 7, 7, 7], "", 4) == []
    assert len(pool.match([1, 1, 1, 1, 7, 7, 7, 7], "", 8)) == 2


def test_evicts_the_least_recently_used_tail_first():
    pool = make_pool(num_blocks=7)
    old, young = run(pool, [1] * 12), run(pool, [2] * 12)
    pool.free(pool.match([1] * 12, "", 12))  # now the other is the older one
    taken = [pool.allocate(1)[0] for _ in range(6)]
    assert taken == [*reversed(young), *reversed(old)]


def test_never_evicts_a_pinned_block():
    pool = make_pool(num_blocks=7)
    pinned = run(pool, [1] * 12)
    run(pool, [2] * 12)
    assert pool.match([1] * 12, "", 12) == pinned
    assert pool.num_free == 3
    taken = pool.allocate(3)
    assert not set(taken) & set(pinned)
    with pytest.raises(OutOfBlocks) as caught:
        pool.allocate(1)
    assert (caught.value.needed, caught.value.free) == (1, 0)
    assert pool.match([1] * 12, "", 12) == pinned


def test_allocating_too_much_evicts_nothing():
    pool = make_pool()
    run(pool, [1] * 12)
    with pytest.raises(OutOfBlocks):
        pool.allocate(9)
    assert pool.num_cached == 3


def test_equal_content_keeps_the_first_block_and_its_age_follows_the_copies():
    pool = make_pool(num_blocks=9)
    first, second = pool.allocate(2), pool.allocate(3)
    pool.commit([1] * 8, first, "", 8)
    pool.commit([1] * 8 + [2] * 4, second, "", 12)
    pool.free(first)
    run(pool, [9] * 4)
    pool.free(second)
    assert pool.num_cached == 4
    pool.allocate(pool.num_free - 3)  # the other prompt goes first, being older than the use of the copies
    assert pool.match([9] * 4, "", 4) == []
    assert pool.match([1] * 8 + [2] * 4, "", 12) == [*first, second[2]]


def test_a_copy_takes_the_place_of_an_evicted_original():
    pool = make_pool(num_blocks=5)
    first, second = pool.allocate(1), pool.allocate(2)
    pool.commit([1] * 4, first, "", 4)
    pool.commit([1] * 8, second, "", 8)
    pool.free(first)
    pool.free(pool.allocate(2))  # evicts the first, and with it what follows it
    assert pool.num_cached == 0
    pool.commit([1] * 8, second, "", 8)
    assert pool.match([1] * 8, "", 8) == second


def test_commit_is_incremental_and_idempotent():
    pool = make_pool()
    tokens = list(range(16))
    blocks = pool.allocate(4)
    for num_computed in (3, 4, 4, 11, 16, 16):
        pool.commit(tokens[:num_computed], blocks, "", num_computed)
        assert pool.num_cached == num_computed // 4
    assert pool.match(tokens, "", 16) == blocks


@pytest.mark.parametrize(
    ("tokens", "blocks", "num_computed"), [(7, 2, 8), (8, 1, 8)], ids=["fewer tokens", "fewer blocks"]
)
def test_commit_refuses_more_than_there_is(tokens, blocks, num_computed):
    pool = make_pool()
    held = pool.allocate(blocks)
    with pytest.raises(ValueError, match="num_computed"):
        pool.commit([1] * tokens, held, "", num_computed)


def test_refuses_blocks_that_are_only_cached():
    pool = make_pool()
    blocks = run(pool, [1] * 8)
    for verb in (pool.free, pool.share):
        with pytest.raises(ValueError, match="not held"):
            verb(blocks)
    with pytest.raises(ValueError, match="not held"):
        pool.commit([2] * 12, [*blocks, 3], "", 12)
    assert (pool.num_free, pool.num_cached) == (8, 2)


def test_keeps_nothing_without_a_prefix_cache():
    pool = make_pool(prefix_cache=False)
    run(pool, [1] * 8)
    assert pool.match([1] * 8, "", 8) == []
    assert pool.num_cached == 0


def test_clear_cache_frees_what_nobody_holds():
    pool = make_pool()
    run(pool, [1] * 8)
    held = pool.allocate(2)
    pool.commit([2] * 8, held, "", 8)
    pool.clear_cache()
    assert (pool.num_cached, pool.num_free, pool.num_allocated) == (0, 6, 2)
    pool.free(held)
    assert pool.num_free == pool.num_total
    run(pool, [1] * 8)
    assert pool.num_cached == 2


@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_random_operations_agree_with_a_model(seed):
    """The model knows who holds what, and what each block was last committed as: all that may be asked of the pool."""
    rng = random.Random(seed)
    num_blocks, block_tokens = rng.choice([(3, 1), (9, 2), (24, 4)])
    pool = make_pool(num_blocks, block_tokens)
    held: Counter[int] = Counter()  # references by users
    content: dict[int, tuple[str, tuple[int, ...]]] = {}  # block -> salt and history that it holds
    sequences: list[tuple[str, list[int], list[int]]] = []  # salt, tokens, blocks

    def release(blocks: list[int]) -> None:
        pool.free(blocks)
        held.subtract(blocks)

    for _ in range(10_000):
        verb = rng.choice(["start", "start", "commit", "commit", "fork", "end", "end", "clear", "misuse"])
        if verb == "start":
            salt = rng.choice(["", "", "s"])
            tokens = [rng.choice([0, 0, 0, 1]) for _ in range(rng.randint(1, 5 * block_tokens))]
            max_tokens = rng.randint(0, len(tokens))
            blocks = pool.match(tokens, salt, max_tokens)
            assert len(blocks) * block_tokens <= max_tokens
            for index, block in enumerate(blocks):
                assert content[block] == (salt, tuple(tokens[: (index + 1) * block_tokens])), "foreign content"
            held.update(blocks)
            needed = -(-len(tokens) // block_tokens) - len(blocks)
            busy = sum(count > 0 for count in held.values())
            if needed > num_blocks - 1 - busy:
                with pytest.raises(OutOfBlocks):
                    pool.allocate(needed)
                release(blocks)
            else:
                fresh = pool.allocate(needed)
                assert len(set(fresh)) == needed
                assert all(0 < block < num_blocks and held[block] == 0 for block in fresh), (
                    "a held block was given away"
                )
                for block in fresh:
                    content.pop(block, None)
                held.update(fresh)
                sequences.append((salt, tokens, blocks + fresh))
        elif verb == "commit" and sequences:
            salt, tokens, blocks = rng.choice(sequences)
            num_computed = rng.randint(0, len(tokens))
            pool.commit(tokens, blocks, salt, num_computed)
            full = num_computed // block_tokens
            for index, block in enumerate(blocks[:full]):
                history = (salt, tuple(tokens[: (index + 1) * block_tokens]))
                assert content.setdefault(block, history) == history
            # everything committed just now is found, whoever wrote it first
            found = pool.match(tokens, salt, full * block_tokens)
            assert len(found) == full
            assert [content[block] for block in found] == [content[block] for block in blocks[:full]]
            pool.free(found)
        elif verb == "fork" and sequences:
            salt, tokens, blocks = rng.choice(sequences)
            pool.share(blocks)
            held.update(blocks)
            sequences.append((salt, tokens, list(blocks)))
        elif verb == "end" and sequences:
            release(sequences.pop(rng.randrange(len(sequences)))[2])
        elif verb == "clear" and rng.random() < 0.05:
            pool.clear_cache()
            assert pool.num_cached == 0
        elif verb == "misuse":
            idle = [block for block in range(1, num_blocks) if held[block] == 0]
            if idle:
                bad = [*(block for block in held if held[block] > 0), rng.choice(idle)]
                with pytest.raises(ValueError, match="block"):
                    rng.choice([pool.free, pool.share])(bad)
        busy = sum(count > 0 for count in held.values())
        assert (pool.num_allocated, pool.num_free) == (busy, num_blocks - 1 - busy)
        assert pool.num_cached <= num_blocks - 1

    for _, _, blocks in sequences:
        release(blocks)
    assert pool.num_free == pool.num_total
    assert not pool._copies
    pool.free(pool.allocate(pool.num_total))
    assert pool.num_cached == 0
