"""What a fresh process costs: importing, and the peak memory of one training step."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

# Trains ResNet-18 for two steps at batch 16, 224 pixels, and prints the peak resident memory in MB.
TRAINING = """
import resource
import numpy as np
import {library} as library
{imports}
model = {model}
images = library.from_numpy(np.zeros((16, 3, 224, 224), np.float32))
labels = library.from_numpy(np.zeros(16, np.int64))
optimizer = library.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
for _ in range(2):
    optimizer.zero_grad()
    library.nn.CrossEntropyLoss()(model(images), labels).backward()
    optimizer.step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def _python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("peer", ["numpy", "torch"])
def test_import(race: Any, torch: Any, peer: str) -> None:
    if peer == "torch" and not torch:
        pytest.skip("PyTorch is not installed")
    race(
        lambda: _python("import gradengine"),
        lambda: _python(f"import {peer}"),
        peer_name=f"import {peer}",
        rounds=7,
    )


def test_peak_memory(torch: Any, record_property: Any, capsys: Any) -> None:
    ours = float(
        _python(
            TRAINING.format(
                library="gradengine",
                imports="from gradengine.models import resnet18",
                model="resnet18()",
            )
        )
    )
    text = f"\npeak memory of a training step, batch 16 at 224 px: gradengine {ours:.0f} MB"
    record_property("gradengine_mb", ours)
    if torch:
        imports = "from tests.models import torch_resnet"
        theirs = float(
            _python(
                TRAINING.format(library="torch", imports=imports, model="torch_resnet.resnet(18)")
            )
        )
        record_property("pytorch_mb", theirs)
        text += f", PyTorch {theirs:.0f} MB"
    with capsys.disabled():
        print(text)
