"""Rows of a fresh process, and of the kernels that a step launches: what the clock of a race cannot say."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_device import ROOT, Device, Run
from benchmarks.gpu_race import COUNT, Contestant, Row
from benchmarks.gpu_steps import CAPTURED, EAGER, Workload

# Trains ResNet-18 for one step and waits for it.
OURS = """
import numpy as np
import gradengine as ge
from gradengine.models import resnet18
ge.set_default_device("{device}")
model = resnet18()
images = ge.asarray(np.ones((BATCH, 3, PIXELS, PIXELS), np.float32)).to("{device}")
labels = ge.asarray(np.zeros(BATCH, np.int64)).to("{device}")
optimizer = ge.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
loss = ge.nn.CrossEntropyLoss()(model(images), labels)
loss.backward()
optimizer.step()
print(loss.item())
"""
THEIRS = """
import numpy as np
import torch
from tests.models.torch_resnet import resnet
model = resnet(18).to("{device}")
images = torch.ones((BATCH, 3, PIXELS, PIXELS), device="{device}")
labels = torch.zeros(BATCH, dtype=torch.int64, device="{device}")
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
loss = torch.nn.CrossEntropyLoss()(model(images), labels)
loss.backward()
optimizer.step()
print(loss.item())
"""


def process_rows(device: Device, batch: int) -> Iterator[Row]:
    """Yield the time from starting Python to the end of the first training step."""

    def measure(runs: dict[str, Run]) -> dict[str, dict[str, float]]:
        ours, theirs = (_code(code, device, batch) for code in (OURS, THEIRS))
        with tempfile.TemporaryDirectory() as folder:
            caches = {"CUPY_CACHE_DIR": folder, "XDG_CACHE_HOME": folder}
            found = {"gradengine, nothing compiled yet": _seconds(ours, **caches)}
            found["gradengine"] = _seconds(ours, **caches)
        if device.torch is not None:
            found["PyTorch"] = _seconds(theirs)
        return {name: {"median": seconds} for name, seconds in found.items()}

    name = f"first training step of a process, batch {batch}"
    yield Row("process", name, [], kind=COUNT, check=measure, importance=40)


def _code(code: str, device: Device, batch: int) -> str:
    pixels = 224 if batch > 2 else 32
    code = code.replace("BATCH", str(batch)).replace("PIXELS", str(pixels))
    return code.replace("{device}", device.name)


def _seconds(code: str, **environment: str) -> float:
    """Return how long a new interpreter takes for it."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        timeout=120,
    )
    return time.perf_counter() - start


def launch_rows(device: Device, batches: list[int], rehearse: bool) -> Iterator[Row]:
    """Yield how many kernels a training step launches, and for how long they keep the device busy.

    They come last: what counts them may slow down all that follows.
    """
    if device.torch is None:
        return
    for batch in batches:
        work = Workload(device, "training", batch, 32 if rehearse else 224)
        contestants: list[Contestant] = [
            *(work.ours(precision) for precision in ("bf16", "tf32")),
            *(work.theirs("nhwc", precision, EAGER) for precision in ("bf16", "tf32")),
            work.ours("bf16", captured=True),
            work.theirs("nhwc", "bf16", CAPTURED),
        ]

        def count(runs: dict[str, Run]) -> dict[str, dict[str, Any]]:
            return {name: counted(device, run) for name, run in runs.items()}

        labels = {"batch": batch}
        name = f"training step, batch {batch}"
        yield Row("launches", name, contestants, COUNT, labels=labels, check=count, importance=90)


def counted(device: Device, run: Run) -> dict[str, Any]:
    """Return the number of kernels of one run, and the seconds that they took together."""
    times = kernel_times(device, run)
    return {
        "launches": sum(count for count, _ in times.values()),
        "busy": sum(seconds for _, seconds in times.values()),
    }


def kernel_times(device: Device, run: Run) -> dict[str, tuple[int, float]]:
    """Return calls and seconds of every kernel that a run launches, whichever library it is from.

    PyTorch's profiler asks the driver, which sees all kernels of the process, also those of a graph.
    """
    from torch.autograd import DeviceType  # pyright: ignore[reportMissingImports]
    from torch.profiler import ProfilerActivity, profile  # pyright: ignore[reportMissingImports]

    run()
    device.synchronize()
    where = ProfilerActivity.CUDA if device.name == "cuda" else ProfilerActivity.CPU
    kind = DeviceType.CUDA if device.name == "cuda" else DeviceType.CPU
    with profile(activities=[where]) as found:
        run()
        device.synchronize()
    times: dict[str, tuple[int, float]] = {}
    for event in found.events() or []:
        if event.device_type == kind:
            calls, seconds = times.get(event.name, (0, 0.0))
            times[event.name] = calls + 1, seconds + 1e-6 * event.time_range.elapsed_us()
    return times
