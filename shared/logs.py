"""Logs of every process: lines on standard error, one format, standard output left to the ready line.

configure_logs("info")
2026-03-01 12:04:31.284 INFO    prefill_worker.scheduler  admitted request 7f3a, 512 tokens
"""

from __future__ import annotations

import logging
import sys
import time
from typing import TextIO

# libraries that would log each request or connection at INFO
_CHATTY = ("aiohttp", "asyncio", "filelock", "httpcore", "httpx", "huggingface_hub", "matplotlib", "urllib3", "uvicorn")


class _Formatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s  %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(record.created))}.{int(record.msecs):03d}"


def configure_logs(level: str, stream: TextIO | None = None) -> None:
    """Sends every record of at least `level` ("debug", "info", "warning", "error") to `stream`, default stderr.

    Warnings of the `warnings` module become records too. Calling it again replaces what an earlier call set up.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Formatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
