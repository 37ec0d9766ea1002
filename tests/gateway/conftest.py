"""What the gateway's tests share: a gateway over one scripted worker of each role."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.scripted_scene import Scene, scene_of


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    """One worker of each role; at the end of a test nothing of it may be left."""
    async with scene_of() as scene:
        yield scene
        await scene.idle()
