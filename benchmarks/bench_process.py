"""What a fresh process costs: importing, the first training step, and the memory at its peak."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import Row
from benchmarks.timing import seconds_of

GROUP = "A fresh process"
# Trains ResNet-18 at batch 16, 224 pixels, and prints the peak resident memory in kB. That is
# Linux's VmHWM: what getrusage says would include the process that started this one.
TRAINING = """
import re
import numpy as np
import {library} as library
{imports}
model = {model}
images = library.from_numpy(np.zeros((16, 3, 224, 224), np.float32))
labels = library.from_numpy(np.zeros(16, np.int64))
optimizer = library.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
for _ in range({steps}):
    optimizer.zero_grad()
    library.nn.CrossEntropyLoss()(model(images), labels).backward()
    optimizer.step()
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""
OURS = {
    "library": "gradengine",
    "imports": "from gradengine.models import resnet18",
    "model": "resnet18()",
}
THEIRS = {
    "library": "torch",
    "imports": "from tests.models import torch_resnet",
    "model": "torch_resnet.resnet(18)",
}


def _python(code: str, **environment: str) -> str:
    """Return what a new interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "GRADENGINE_DEVICE": "cpu", **environment},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_import(race: Any, torch: Any) -> None:
    runs = {"gradengine": lambda: _python("import gradengine")}
    if torch:
        runs["PyTorch"] = lambda: _python("import torch")
    race(GROUP, "import", runs, seconds=8)


def test_first_training_step(race: Any, record: Any, torch: Any, tmp_path: Path) -> None:
    caches = {"NUMBA_CACHE_DIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    ours, theirs = (TRAINING.format(**names, steps=1) for names in (OURS, THEIRS))
    compiling = seconds_of(lambda: _python(ours, **caches))
    assert any(tmp_path.iterdir())  # it did compile, into these folders
    record(
        Row(
            GROUP,
            "import, ResNet-18, one training step; nothing compiled yet",
            {"gradengine": compiling},
        )
    )
    runs = {"gradengine": lambda: _python(ours, **caches)}
    if torch:
        runs["PyTorch"] = lambda: _python(theirs)
    race(GROUP, "import, ResNet-18, one training step", runs, seconds=8)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory(record: Any, torch: Any) -> None:
    contestants = {"gradengine": OURS} | ({"PyTorch": THEIRS} if torch else {})
    peaks = {
        name: int(_python(TRAINING.format(**names, steps=2))) * 1024 / 1e6
        for name, names in contestants.items()
    }
    record(Row(GROUP, "peak memory of training steps, 16 x 224 px", peaks, unit="MB"))
