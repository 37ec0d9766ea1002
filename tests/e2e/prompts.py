"""Prompts that the end-to-end tests send: block edges, scripts, code and conversations. The block size is 16 tokens."""

from __future__ import annotations

import random

from tandem.v1 import inference_pb2

TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "SELECT name, COUNT(*) FROM orders WHERE",
    "北京是中国的首都，",
    "今天天气很好，我们去公园",
    "🚀🌍👩‍🔬 The scientist wrote:",
    "Ünïcödé naïve café résumé —",
    "Once upon a time, in a land far away,",
    "1, 1, 2, 3, 5, 8,",
    '{"name": "Alice", "age": 30, "city":',
    "import numpy as np\nimport torch\n\nclass Attention(torch.nn.Module):\n",
    "Q: What is the boiling point of water?\nA:",
    "To be, or not to be, that is the",
    "Dear Sir or Madam,\n\nI am writing to",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "Water is composed of hydrogen and",
)

CHATS = (
    (("user", "What is gravity?"),),
    (("system", "You answer in one short sentence."), ("user", "Name three colors.")),
    (("user", "Hi!"), ("assistant", "Hello! How can I help you?"), ("user", "Tell me about the moon.")),
    (("user", "用中文说你好"),),
)

# prompts of exactly so many tokens: one token, around one block, three blocks and a bit, and a long one
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 55, 120, 1500)


def token_ids(length: int, seed: int = 7) -> list[int]:
    """Words of the vocabulary's middle, drawn once and for all; special tokens stand below 100."""
    rng = random.Random(f"{seed}/{length}")
    return [rng.randrange(100, 40_000) for _ in range(length)]


def requests() -> list[inference_pb2.GenerateRequest]:
    """Every prompt as a request without sampling parameters: 31 of them."""
    texts = [inference_pb2.GenerateRequest(text=text) for text in TEXTS]
    chats = [
        inference_pb2.GenerateRequest(
            messages=inference_pb2.ChatMessages(
                messages=[inference_pb2.ChatMessage(role=role, content=content) for role, content in chat]
            )
        )
        for chat in CHATS
    ]
    lengths = [
        inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=token_ids(length))) for length in LENGTHS
    ]
    return [*texts, *chats, *lengths]
