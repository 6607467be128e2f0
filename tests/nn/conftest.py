"""These tests build their tensors on the CPU, whatever the machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gradengine.devices import set_default_device


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Iterator[None]:
    set_default_device("cpu")
    yield
    set_default_device(None)
