"""Ranks that compute one model together, over a process group of torch.distributed: gloo on CPUs, NCCL on CUDA devices.

Every rank calls the same methods in the same order, with tensors of the same dtype and number of rows. What they give
is the same, to the bit, on every rank, and a row of it does not depend on the rows beside it: elements are moved, or
added in the order of the ranks.

A rank that dies closes its connections: with gloo the others' next call, or the one they wait in, raises GroupError at
once. A rank that is stuck ends their wait after the timeout that the group was started with (start.py). NCCL notices
either by the timeout alone, and its watchdog then ends the process; who knows earlier calls `abort`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from shared.parallel.loopback import loopback
from shared.parallel.sharding import cut


class GroupError(RuntimeError):
    """A rank is gone, or did not come in time. The group is of no more use, and its process should end."""


class Group:
    """A process group as one of its ranks sees it. One thread at a time."""

    def __init__(self, process_group: dist.ProcessGroup, device: torch.device, *, is_here: bool = False) -> None:
        """device: where this rank's tensors lie. is_here: its connections are within this host."""
        self.process_group, self.device, self._is_here = process_group, device, is_here
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self._sent, self._received = (torch.empty(0, dtype=torch.uint8, device=device) for _ in range(2))

    @classmethod
    def of(cls, process_group: dist.ProcessGroup, *, is_here: bool = False) -> Group:
        """With NCCL tensors lie on the current CUDA device. ValueError in a process that is no rank."""
        if dist.get_rank(process_group) < 0:
            raise ValueError("this process is no rank of the process group")
        on_cuda = "nccl" in dist.get_backend(process_group)
        device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
        return cls(process_group, device, is_here=is_here)

    def part(self, ranks: Sequence[int]) -> Group:
        """Some of these ranks, this one among them, as a group of their own, in their order. All of them call this."""
        global_ranks = dist.get_process_group_ranks(self.process_group)
        with loopback(self._is_here and self.device.type == "cpu"), _lost_ranks():
            made = dist.new_group(
                [global_ranks[rank] for rank in ranks],
                backend=dist.get_backend(self.process_group),
                use_local_synchronization=True,
            )
        assert isinstance(made, dist.ProcessGroup)
        return Group(made, self.device, is_here=self._is_here)

    def gather(self, x: Tensor, widths: Sequence[int], out: Tensor | None = None) -> Tensor:
        """The ranks' columns side by side, in the order of the ranks: x [rows, widths[rank]] -> [rows, sum(widths)].

        x contiguous, of any dtype; widths: of every rank. ValueError for another shape of x, or of out.
        """
        rows = x.shape[0]
        if x.dim() != 2 or x.shape[1] != widths[self.rank] or len(widths) != self.size:
            raise ValueError(f"x must be [rows, {widths[self.rank]}] of widths {list(widths)}, got {list(x.shape)}")
        if out is None:
            out = x.new_empty(rows, sum(widths))
        elif out.shape != (rows, sum(widths)) or out.dtype != x.dtype or not out.is_contiguous():
            raise ValueError(
                f"out must be contiguous {x.dtype} [{rows}, {sum(widths)}], got {out.dtype} {list(out.shape)}"
            )
        if not out.numel():
            return out
        # messages are of one size, and of bytes: gloo does not know all dtypes
        widest, itemsize = max(widths), x.element_size()
        num_bytes = rows * widest * itemsize
        is_even = rows * min(widths) == rows * widest
        message = _bytes(x)
        if not is_even:
            self._sent = _grown(self._sent, num_bytes)
            self._sent[: message.numel()] = message
            message = self._sent[:num_bytes]
        is_placed = is_even and rows == 1
        if not is_placed:
            self._received = _grown(self._received, num_bytes * self.size)
        received = (_bytes(out) if is_placed else self._received[: num_bytes * self.size]).view(self.size, num_bytes)
        with _lost_ranks():
            dist.all_gather(list(received), message, group=self.process_group)
        if not is_placed:
            for part, first, width in zip(received, accumulate(widths, initial=0), widths, strict=False):
                columns = part[: rows * width * itemsize].view(x.dtype).view(rows, width)
                out[:, first : first + width] = columns
        return out

    def add_disjoint(self, x: Tensor) -> Tensor:
        """The sum of the ranks' x, contiguous, in place -> x. On all ranks but one an element is zero, without a sign:
        what is added are the bytes, so that every bit of the one comes through."""
        with _lost_ranks():
            dist.all_reduce(_bytes(x), group=self.process_group)
        return x

    def add(self, partial: Tensor, out: Tensor) -> Tensor:
        """The sum of the ranks' partial sums, float32 [rows, width] contiguous, rounded once to out's dtype -> out.

        Each rank adds some of the columns, in the order of the ranks, and these are gathered.
        """
        rows, width = partial.shape
        if partial.dtype != torch.float32 or out.shape != partial.shape:
            raise ValueError(f"partial must be float32 {list(out.shape)}, got {partial.dtype} {list(partial.shape)}")
        shares = cut(width, self.size)
        widths = [len(share) for share in shares]
        own = widths[self.rank]
        sent = torch.cat([partial[:, share.start : share.stop].reshape(-1) for share in shares])
        received = partial.new_empty(self.size * rows * own)
        with _lost_ranks():
            dist.all_to_all_single(
                received, sent, [rows * own] * self.size, [rows * each for each in widths], group=self.process_group
            )
        first, *others = received.view(self.size, rows, own)
        for other in others:
            first += other
        return self.gather(first.to(out.dtype), widths, out)

    def abort(self) -> None:
        """Ends a wait for ranks that are gone, on this rank's device: on CPUs their closed connections end it. From any
        thread; the group is of no more use."""
        if self.device.type == "cuda":
            self.process_group.abort()

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """What rank `source` has in x, contiguous, in place -> x."""
        with _lost_ranks():
            dist.broadcast(_bytes(x), group=self.process_group, group_src=source)
        return x


@contextmanager
def _lost_ranks() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise GroupError(f"a rank is gone or did not come in time: {error}") from error


def _bytes(x: Tensor) -> Tensor:
    """Over the same memory."""
    return x.view(-1).view(torch.uint8)


@torch.inference_mode(False)  # it outlives the mode that it is first asked for in
def _grown(buffer: Tensor, num_bytes: int) -> Tensor:
    return buffer if buffer.numel() >= num_bytes else buffer.new_empty(num_bytes)
