"""The engine: what the workers drive, and what `init_inference` makes of a model."""

from shared.engine.encoder_engine import EncoderEngine
from shared.engine.engine import Engine, Memory
from shared.engine.inference import InferenceEngine, init_inference
from shared.engine.plan import EnginePlan

__all__ = ["EncoderEngine", "Engine", "EnginePlan", "InferenceEngine", "Memory", "init_inference"]
