"""What the layers end with: the rows whose logits are wanted, normalised, through the output layer."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dtypes import DTYPES
from kernels.gather import gather
from kernels.linear import LinearWeight, linear
from shared.batch import RaggedBatch
from shared.config.modules import UnembedConfig
from shared.engine.modules.module import Module, check_dtype
from shared.engine.modules.norm import norm_param, normed


class Unembed(Module[UnembedConfig]):
    """logits = norm(hidden_states of the batch's logit_rows) @ vocab_embedding.T + bias

    Those rows are the last of each sequence, unless the batch's entries want all of theirs, or none.
    """

    name = "ragged_unembed"
    config_class = UnembedConfig

    def __init__(self, config: UnembedConfig, *, eps: float = 1e-5, device: torch.device | str = "cpu") -> None:
        """eps: of the norm, if there is one."""
        super().__init__(config, device=device)
        self._eps = eps
        most = min(config.max_sequences, config.max_tokens)
        for name in ("wanted", *(("normed",) if config.norm_type else ())):
            self._take(name, most, config.model_dim, config.dtype)
        self._take("output", most, config.vocab_size, config.dtype)

    @classmethod
    def objection(cls, config: UnembedConfig) -> str | None:
        return None  # whatever the fields allow is computed

    def transform_param(self, param: Tensor, bias: Tensor | None = None) -> LinearWeight:
        """The output layer [vocab_size, model_dim] as a call wants it, with its bias. ValueError for another shape."""
        shape = (self.config.vocab_size, self.config.model_dim)
        if param.shape != shape:
            raise ValueError(f"param: is {list(param.shape)}, wanted {list(shape)}")
        dtype = DTYPES[self.config.dtype]
        placed = None if bias is None else bias.to(self.device, dtype)
        return LinearWeight(param.to(self.device, dtype), placed)

    def transform_norm_param(self, param: Tensor) -> Tensor:
        """gamma or beta [model_dim] as a call wants it."""
        return norm_param(param, self.config.dtype, self.device)

    def __call__(
        self,
        hidden_states: Tensor,
        vocab_embedding: LinearWeight,
        ragged_metadata: RaggedBatch,
        *,
        gamma: Tensor | None = None,
        beta: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [tokens, model_dim] -> logits [wanted rows, vocab_size] of the config's dtype, or `out`, which
        may also be float32. ValueError for more sequences than max_sequences."""
        config, batch = self.config, ragged_metadata
        check_dtype("hidden_states", hidden_states, "dtype", config.dtype)
        if batch.num_sequences > config.max_sequences:
            raise ValueError(
                f"max_sequences: {batch.num_sequences} sequences, and the module was made for {config.max_sequences}"
            )
        rows = len(batch.logit_rows)
        x = gather(hidden_states, batch.logit_rows, out=self._take("wanted", rows, config.model_dim, config.dtype))
        if config.norm_type is not None:
            x = normed(
                x, config.norm_type, gamma, beta, self._eps, self._take("normed", rows, config.model_dim, config.dtype)
            )
        elif gamma is not None or beta is not None:
            raise ValueError("gamma, beta: are given, and the config's norm_type is none; leave them out")
        if out is None:
            out = self._take("output", rows, config.vocab_size, config.dtype)
        return linear(x, vocab_embedding, out=out)
