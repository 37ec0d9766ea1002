import random
import time

import pytest

from shared.block_allocator import BlockAllocator, OutOfBlocks


def test_hands_out_contiguous_runs_and_never_the_null_block():
    allocator = BlockAllocator(9)
    assert allocator.num_total == allocator.num_free == 8
    first, second = allocator.allocate(3), allocator.allocate(5)
    assert first == [1, 2, 3]
    assert second == [4, 5, 6, 7, 8]
    allocator.free(first)
    assert allocator.allocate(3) == first


def test_allocates_all_or_nothing():
    allocator = BlockAllocator(5)
    with pytest.raises(OutOfBlocks) as caught:
        allocator.allocate(5)
    assert isinstance(caught.value, ValueError)
    assert (caught.value.needed, caught.value.free) == (5, 4)
    assert allocator.num_free == 4
    assert allocator.allocate(0) == []
    with pytest.raises(ValueError, match="-1"):
        allocator.allocate(-1)


@pytest.mark.parametrize("verb", ["free", "share"])
@pytest.mark.parametrize("bad", [[1, 2, 2], [1, 2, 0], [1, 2, -1], [1, 2, 9], [1, 2, 3]])
def test_changes_nothing_when_any_block_is_wrong(verb, bad):
    allocator = BlockAllocator(9)
    allocator.allocate(2)
    with pytest.raises(ValueError, match="block"):
        getattr(allocator, verb)(bad)
    assert allocator.num_free == 6
    assert [allocator.references(block) for block in range(1, 9)] == [1, 1, 0, 0, 0, 0, 0, 0]


def test_needs_a_block_beside_the_null_block():
    with pytest.raises(ValueError, match="num_blocks"):
        BlockAllocator(1)


@pytest.mark.parametrize("seed", range(3))
def test_ten_thousand_random_operations_agree_with_a_model(seed):
    rng = random.Random(seed)
    num_blocks = rng.choice([2, 17, 64])
    allocator = BlockAllocator(num_blocks)
    model: dict[int, int] = {}  # block -> references, 0 never stored
    for _ in range(10_000):
        verb = rng.choice(["allocate", "share", "free", "free"])
        if verb == "allocate":
            n = rng.randint(0, num_blocks // 2)
            if n > num_blocks - 1 - len(model):
                with pytest.raises(OutOfBlocks):
                    allocator.allocate(n)
            else:
                blocks = allocator.allocate(n)
                assert len(set(blocks)) == n
                assert not model.keys() & set(blocks)
                assert all(1 <= block < num_blocks for block in blocks)
                model.update(dict.fromkeys(blocks, 1))
        else:
            blocks = rng.sample(sorted(model), rng.randint(0, len(model)))
            if rng.random() < 0.2:
                blocks.insert(rng.randint(0, len(blocks)), rng.randint(-2, num_blocks + 2))
            valid = len(set(blocks)) == len(blocks) and all(block in model for block in blocks)
            if not valid:
                with pytest.raises(ValueError, match="block"):
                    getattr(allocator, verb)(blocks)
            else:
                getattr(allocator, verb)(blocks)
                for block in blocks:
                    model[block] += 1 if verb == "share" else -1
                    if model[block] == 0:
                        del model[block]
        assert allocator.num_free == num_blocks - 1 - len(model)
        assert all(allocator.references(block) == model.get(block, 0) for block in range(1, num_blocks))


def test_cost_per_block_does_not_grow_with_the_pool():
    def seconds(num_blocks: int) -> float:
        allocator = BlockAllocator(num_blocks)
        allocator.allocate(num_blocks // 2)
        best = float("inf")
        for _ in range(20):
            begin = time.perf_counter()
            for _ in range(50):
                allocator.free(allocator.allocate(16))
            best = min(best, time.perf_counter() - begin)
        return best

    assert seconds(1_000_000) < 10 * seconds(1_000)
