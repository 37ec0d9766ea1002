"""Philox4x32-10, the counter-based generator, and the one uniform number each generated token draws from it.

Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC11). A number depends on its key and counter
alone, so a token's draw can be made again by any worker at any time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def token_uniforms(
    seeds: Sequence[int], indices: Sequence[int], positions: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """One uniform number in [0, 1) per token: [rows] float64, multiples of 2**-53.

    key = the 64-bit seed, counter = (position among the generated tokens, sample index, 0, 0); the last two words are
    left for draws of another kind. The two first output words give the 53 bits, as in the Mersenne Twister's res53.
    """
    key = torch.tensor([(seed & WORD, seed >> 32) for seed in seeds], dtype=torch.int64, device=device).view(-1, 2)
    counter = torch.tensor(
        [(position, index, 0, 0) for position, index in zip(positions, indices, strict=True)],
        dtype=torch.int64,
        device=device,
    ).view(-1, 4)
    words = philox4x32(counter, key)
    return ((words[:, 0] >> 5) * 2**26 + (words[:, 1] >> 6)).double() * 2.0**-53


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """counter [rows, 4] and key [rows, 2], int64 holding 32-bit words -> [rows, 4] int64 of 32-bit words."""
    # Words 0 and 2 are multiplied, 1 and 3 only mixed in: two pairs [rows, 2], half the operations of four words.
    even, odd = counter[:, 0::2], counter[:, 1::2]
    multipliers = torch.tensor(MULTIPLIERS, device=key.device)
    rounds = torch.arange(ROUNDS, device=key.device)[:, None, None]
    for round_key in (key + rounds * torch.tensor(KEY_INCREMENTS, device=key.device)) & WORD:
        # The product fills all 64 bits and int64 wraps around: the bits are right, and the mask takes back the sign
        # that the arithmetic shift spreads.
        product = (even * multipliers).flip(-1)
        even, odd = ((product >> 32) & WORD) ^ odd ^ round_key, product & WORD
    return torch.stack((even, odd), dim=-1).flatten(1)
