"""What every linear promises its rows."""

from collections.abc import Iterable

import torch

from kernels.linear import LinearWeight, linear, probe_row_invariance


def assert_rows_keep_their_bits(packed: LinearWeight, counts: Iterable[int]) -> None:
    """Rows first or last among so many, on several numbers of threads, against all of 256 on one thread."""
    probe_row_invariance(packed)
    x = torch.randn(256, packed.in_features).to(packed.dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = linear(x, packed)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for rows in counts:
                assert torch.equal(linear(x[:rows], packed), whole[:rows]), (threads, rows)
                assert torch.equal(linear(x[-rows:], packed), whole[-rows:]), (threads, rows)
    finally:
        torch.set_num_threads(before)
