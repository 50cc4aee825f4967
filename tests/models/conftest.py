"""Families of three blocks: a network of them is built in a fraction of the time, by the same functions."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from pipeline.models.variants import FAMILIES


@pytest.fixture(autouse=True, scope="package")
def short_families() -> Iterator[None]:
    """Register the families short and short_lite: the first two stages, so blocks 1a, 2a and 2b."""
    with pytest.MonkeyPatch.context() as patch:
        for name, whole in (("short", "efficientnet"), ("short_lite", "efficientnet_lite")):
            patch.setitem(FAMILIES, name, replace(FAMILIES[whole], blocks=FAMILIES[whole].blocks[:2]))
        yield
