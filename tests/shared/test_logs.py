"""One format on one stream."""

import io
import logging
import re
import warnings
from collections.abc import Iterator

import pytest

from shared.logs import configure_logs


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The root logger as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def test_a_line_has_time_level_name_and_text():
    stream = io.StringIO()
    configure_logs("info", stream)
    logging.getLogger("some.module").info("admitted %d", 3)
    logging.getLogger("some.module").debug("not shown")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO    some\.module  admitted 3\n", stream.getvalue())


def test_a_second_call_replaces_the_first():
    first, second = io.StringIO(), io.StringIO()
    configure_logs("info", first)
    configure_logs("debug", second)
    logging.getLogger("x").debug("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1


def test_warnings_and_tracebacks_come_too_and_libraries_are_quiet():
    stream = io.StringIO()
    configure_logs("info", stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("look out", stacklevel=1)
    try:
        raise KeyError("k")
    except KeyError:
        logging.getLogger("x").exception("failed")
    logging.getLogger("httpx").info("GET /")
    text = stream.getvalue()
    assert "look out" in text
    assert "KeyError: 'k'" in text
    assert "GET /" not in text
