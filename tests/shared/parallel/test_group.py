"""What ranks exchange: columns put side by side, sums that are added in order, and what becomes of a rank that dies."""

import os
import re
import signal
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shared.parallel.group import Group, GroupError
from shared.parallel.start import end_group, start_group, start_group_of_environment
from tests.ranks import on_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.float8_e4m3fn, torch.bool)
WIDTHS = {2: [(4, 4), (5, 3), (1, 40), (7, 0)], 3: [(4, 4, 4), (9, 3, 1), (0, 2, 5)]}


def columns(rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(rows, width, generator=generator) * 10
    return (numbers > 0) if dtype == torch.bool else numbers.to(dtype)


def partials(size: int, rows: int, width: int) -> Tensor:
    """Sums whose order shows: float32 [ranks, rows, width]."""
    generator = torch.Generator().manual_seed(rows)
    scale = torch.tensor([1e6, -1e6, 1.0, 1e-3])[:size, None, None]
    return torch.randn(size, rows, width, generator=generator) * scale


def check_all(group: Group) -> None:
    for widths in WIDTHS[group.size]:
        first = sum(widths[: group.rank])
        for dtype in DTYPES:
            for rows in (1, 5):
                whole = columns(rows, sum(widths), dtype, rows)
                own = whole[:, first : first + widths[group.rank]].contiguous()
                gathered = group.gather(own, widths)
                assert gathered.dtype == dtype
                assert same_bytes(gathered, whole)
                out = torch.zeros_like(whole)
                assert group.gather(own, widths, out) is out
                assert same_bytes(out, whole)

    assert group.gather(torch.zeros(0, 4), [4] * group.size).shape == (0, 4 * group.size)

    for dtype in (torch.float32, torch.bfloat16):
        for rows, width in ((1, 3), (4, 11)):
            # signed zeros and NaN are bits like others
            whole = columns(rows, width, dtype, 3)
            whole[0, 0], whole[-1, -1] = -0.0, torch.nan
            mine = (torch.arange(rows * width).view(rows, width) % group.size) == group.rank
            x = torch.where(mine, whole, torch.zeros((), dtype=dtype))
            assert group.add_disjoint(x) is x
            assert same_bytes(x, whole)

    for dtype in (torch.float32, torch.bfloat16):
        for rows, width in ((1, 1), (1, 64), (7, 33)):
            each = partials(group.size, rows, width)
            expected = each[0].clone()
            for other in each[1:]:
                expected += other
            out = torch.empty(rows, width, dtype=dtype)
            assert group.add(each[group.rank].clone(), out) is out
            assert torch.equal(out, expected.to(dtype))
            # a row alone has the same bits
            for row in range(rows):
                alone = group.add(each[group.rank, row : row + 1].clone(), torch.empty(1, width, dtype=dtype))
                assert torch.equal(alone[0], out[row])

    for source in range(group.size):
        for dtype in DTYPES:
            whole = columns(2, 3, dtype, 8)
            x = whole.clone() if group.rank == source else torch.zeros_like(whole)
            assert same_bytes(group.broadcast(x, source), whole)


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def check_contract(group: Group) -> None:
    with pytest.raises(ValueError, match=re.escape("x must be [rows, 3]")):
        group.gather(torch.zeros(2, 4), [3, 3])
    with pytest.raises(ValueError, match="out must be contiguous"):
        group.gather(torch.zeros(2, 3), [3, 3], torch.zeros(2, 5))
    with pytest.raises(ValueError, match="partial must be float32"):
        group.add(torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="end_group first"):
        start_group(rank=0, size=1, rendezvous="tcp://127.0.0.1:1")
    assert group.device == torch.device("cpu")
    assert Group.of(group.process_group).rank == group.rank
    # a group of some of them
    some = dist.new_group([1])
    if group.rank == 1:
        assert (Group.of(some).rank, Group.of(some).size) == (0, 1)
        assert torch.equal(Group.of(some).gather(torch.ones(2, 2), [2]), torch.ones(2, 2))
    else:
        with pytest.raises(ValueError, match="no rank"):
            Group.of(some)


def check_stuck(group: Group, fifo: str) -> None:
    """A rank that does not come, but lives, is waited for so long and no longer."""
    impatient = Group.of(dist.new_group(timeout=timedelta(seconds=3)))
    if group.rank == 1:
        Path(fifo).read_bytes()  # until the other rank has had enough
        return
    with pytest.raises(GroupError, match=r"^a rank is gone or did not come in time"):
        impatient.gather(torch.zeros(1, 2), [2, 2])
    Path(fifo).write_bytes(b"")


def check_two(group: Group, fifo: str) -> None:
    check_all(group)
    check_contract(group)
    check_stuck(group, fifo)


def check_three(group: Group) -> str:
    """The last one dies; what the others are told."""
    check_all(group)
    if group.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        # of so many calls one waits for the dead rank
        for _ in range(4):
            group.gather(torch.zeros(1, 2), [2, 2, 2])
    except GroupError as error:
        return str(error)
    return "nothing"


def test_two_ranks_of_which_one_does_not_come(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    on_ranks(check_two, 2, str(tmp_path / "fifo"))


def test_three_ranks_of_which_one_dies():
    first, second, third = on_ranks(check_three, 3, dying=[2])
    assert third is None
    assert first.startswith("a rank is gone or did not come in time:")
    assert second.startswith("a rank is gone or did not come in time:")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_group_of_one_waits_for_nobody(device: str, tmp_path: Path):
    group = start_group(rank=0, size=1, rendezvous=f"file://{tmp_path}/place", device=device)
    try:
        assert group.device.type == device
        for rows in (1, 3):
            x = torch.randn(rows, 4, device=device)
            assert torch.equal(group.gather(x, [4]), x)
            assert torch.equal(group.gather(x.bfloat16(), [4]), x.bfloat16())
            assert torch.equal(group.add(x.clone(), torch.empty_like(x)), x)
            assert torch.equal(group.add_disjoint(x.clone()), x)
            assert torch.equal(group.broadcast(x.clone()), x)
    finally:
        end_group()
    end_group()
    with pytest.raises(ValueError, match="rank must be one of 1"):
        start_group(rank=1, size=1, rendezvous=f"file://{tmp_path}/other")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT: not set"),
        ({"RANK": "a", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK: 'a' is no number"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "rank must be one of 2"),
    ],
)
def test_an_environment_without_ranks_is_refused(environment: dict[str, str], message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        start_group_of_environment(environment=environment)


def test_ranks_that_do_not_come_are_missed(tmp_path: Path):
    with pytest.raises(GroupError, match="rank 0 of 2 found no others at file://"):
        start_group(rank=0, size=2, rendezvous=f"file://{tmp_path}/place", timeout_s=0.5)


@pytest.mark.parametrize(("device", "calls"), [("cuda", 1), ("cpu", 0)])
def test_a_wait_on_a_device_is_ended_by_hand(device: str, calls: int) -> None:
    """NCCL's kernels wait for a rank that is gone; gloo sees its closed connections."""

    class Process:
        aborted = 0

        def abort(self) -> None:
            self.aborted += 1

    group, process_group = object.__new__(Group), Process()
    group.device, group.process_group = torch.device(device), process_group  # pyright: ignore[reportAttributeAccessIssue]
    group.abort()
    assert process_group.aborted == calls
