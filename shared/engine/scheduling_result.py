"""Whether a batch can be computed now: DeepSpeed's names and values."""

from enum import Enum


class SchedulingResult(Enum):
    """What a RaggedEngine says of a batch before it computes it."""

    Success = 0
    EngineSequenceLimitExceeded = 1  # max_tracked_sequences
    BatchSequenceLimitExceeded = 2  # max_ragged_sequence_count
    BatchTokenLimitExceeded = 3  # max_ragged_batch_size
    KVCacheLimitExceeded = 4  # blocks that are free
    SequenceTokenLimitExceeded = 5  # max_context, or what the model has positions for


class SchedulingError(RuntimeError):
    """A batch, or a sequence that comes or returns, goes beyond a limit; nothing was changed."""

    def __init__(self, result: SchedulingResult) -> None:
        super().__init__(f"Batch scheduling failed with result {result}")
        self.result = result
