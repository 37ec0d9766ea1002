"""The engine: what the workers drive, what `init_inference` makes of a model, and the ragged engine of programs."""

from shared.engine.encoder_engine import EncoderEngine
from shared.engine.engine import Engine, Memory
from shared.engine.inference import InferenceEngine, init_inference
from shared.engine.plan import EnginePlan
from shared.engine.ragged_engine import RaggedEngine
from shared.engine.scheduling_result import SchedulingError, SchedulingResult
from shared.engine.split_fuse import SplitFuse

__all__ = [
    "EncoderEngine",
    "Engine",
    "EnginePlan",
    "InferenceEngine",
    "Memory",
    "RaggedEngine",
    "SchedulingError",
    "SchedulingResult",
    "SplitFuse",
    "init_inference",
]
