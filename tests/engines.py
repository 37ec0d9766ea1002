"""A tiny engine without processes around it, for tests that drive a scheduler step by step."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from tandem.v1 import decode_pb2

from shared.config import load_config
from shared.engine import Engine, EnginePlan
from shared.model_store import ModelStore
from shared.token_request import Limits, TokenRequest, read_token_request
from tests.workers import Request


@functools.cache
def tiny_engine(
    model: Path, num_blocks: int = 64, max_running: int = 64, kv_dtype: str = "auto", dtype: str = "float32"
) -> Engine:
    """Blocks of 16 tokens. Shared by tests: what it holds is theirs to overwrite."""
    overrides = {
        "model": str(model),
        "dtype": dtype,
        "kv_dtype": kv_dtype,
        "threads": 2,
        "decode": {"num_blocks": num_blocks, "max_running": max_running},
    }
    config = load_config(None, overrides)
    return Engine(EnginePlan.of(config, config.decode, ModelStore().resolve(config.model)))


def token_request(engine: Engine, request: Request, output_indices: Any = None) -> TokenRequest:
    """As the services read it off the wire."""
    plan = engine.plan
    limits = Limits(
        model="tiny",
        vocab_size=plan.architecture.vocab_size,
        max_context=plan.max_context,
        block_tokens=plan.layout.block_tokens,
        num_blocks=plan.num_blocks - 1,
    )
    fields = request.fields
    if output_indices is not None:
        fields["output_indices"] = output_indices
    return read_token_request(decode_pb2.Admit(**fields), limits)
