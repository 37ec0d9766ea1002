"""Triton's own functions are made for its interpreter, or for a GPU, when Triton is first imported, by whomever.

To be imported before all that may import it: transformers does.
"""

import pytest
import torch

if not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        # for the import alone: the processes that tests start are to compute in C
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.language  # noqa: F401
