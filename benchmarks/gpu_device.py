"""Where the rows of the GPU benchmarks run: one CUDA device under both libraries, or a rehearsal.

`Cuda` makes arrays and tensors, times work by events, and measures memory. `Rehearsal` answers the
same calls without a GPU, on NumPy arrays and CPU tensors, so that every row's code can be tried out.
"""

from __future__ import annotations

import gc
import importlib.util
import platform
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import gradengine as ge
from gradengine.devices import cuda_version
from gradengine.kernels import settings

Run = Callable[[], Any]
ROOT = Path(__file__).parents[1]
SPIN_LIMIT = 0.05  # seconds that the device may be kept waiting while runs are queued
# Keeps the device busy for a number of clock cycles: what is queued behind it starts without gaps.
SPIN = r"""
extern "C" __global__ void spin(long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) {
    }
}
"""


class Turn(NamedTuple):
    """The seconds of each timed run of one turn, and the seconds that queueing one run took."""

    seconds: list[float]
    queueing: float


class Memory(NamedTuple):
    """What a contestant took, in bytes: live arrays at their peak, and what the device lost to it.

    The first is what its allocator handed out, without CUDA's own; either is None if unknown.
    """

    arrays: int | None
    device: int | None


def import_torch() -> Any:
    """Return PyTorch, or None where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch  # pyright: ignore[reportMissingImports]

    return torch


def bfloat16() -> Any:
    """Return NumPy's dtype of bfloat16. Raises ImportError where ml_dtypes is not installed."""
    import ml_dtypes  # pyright: ignore[reportMissingImports]

    return np.dtype(ml_dtypes.bfloat16)


class Device:
    """What both have in common: `xp` is the array module, `torch` PyTorch or None."""

    name = "cpu"
    xp: Any = np
    torch: Any = None
    rounds = (3, 12)  # turns of each contestant: at least, even if they take too long; at most
    blocks = (2, 2, 2, 2)  # of each stage of the network that steps train: ResNet-18's

    # -- arrays ------------------------------------------------------------------------------------

    def dtype(self, precision: str) -> Any:
        """Return the elements that a kernel is given in "fp32", "tf32" or "bf16"."""
        return bfloat16() if precision == "bf16" else np.dtype(np.float32)

    def random(self, shape: tuple[int, ...], dtype: Any, seed: int = 0) -> Any:
        """Return numbers of a standard normal distribution, C-contiguous.

        They repeat after about a million: drawing them on the host would take longer than the rows.
        """
        dtype = np.dtype(dtype)
        size = int(np.prod(shape))
        block = np.random.default_rng(seed).standard_normal(min(size, 1_000_003), np.float32)
        carrier = np.dtype(f"u{dtype.itemsize}")  # not every array function knows bfloat16
        values = self.xp.asarray(block.astype(dtype).view(carrier))
        return self.xp.resize(values, shape).view(dtype)

    def random_nhwc(self, shape: tuple[int, ...], dtype: Any, seed: int = 0) -> Any:
        """Return such numbers (N, C, H, W), channels last in memory."""
        n, c, h, w = shape
        return self.random((n, h, w, c), dtype, seed).transpose(0, 3, 1, 2)

    def to_torch(self, array: Any) -> Any:
        """Return a tensor that shares memory with an array of this device."""
        if array.dtype.name == "bfloat16":
            return self.torch.from_dlpack(array.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_dlpack(array)

    def distance(self, ours: Any, theirs: Any) -> float:
        """Return how far an array is from a tensor, as a share of the tensor's length."""
        found, expected = self.to_torch(ours).float(), theirs.float()
        return float((found - expected).norm() / expected.norm())

    # -- what is compared --------------------------------------------------------------------------

    def fast_matmul(self) -> None:
        """Let ours multiply float32 in TF32, as PyTorch's convolutions do by default."""
        ge.set_float32_matmul_precision("high")
        ge.backends.cuda.conv_tf32 = True

    def autocast(self) -> AbstractContextManager[Any]:
        """Return our context of mixed precision in bfloat16."""
        return ge.autocast("cuda", dtype=ge.bfloat16)

    def torch_autocast(self) -> AbstractContextManager[Any]:
        return self.torch.autocast(self.name, self.torch.bfloat16)

    def capture(self, step: Run) -> Run:
        """Return our step as a CUDA graph, which its first calls have captured."""
        captured = ge.cuda.graph(step)
        for _ in range(5):  # three as they are, one captured and replayed, one more if it has to be
            captured()
        return captured

    def torch_capture(self, step: Run) -> Run:
        """Return PyTorch's step as a CUDA graph, as its documentation says to do it."""
        torch = self.torch
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()

        def replay(kept: Run = step) -> None:  # a graph does not keep the model and images it reads
            graph.replay()

        return replay

    def torch_compile(self, function: Callable[..., Any], mode: str) -> Callable[..., Any]:
        return self.torch.compile(function, mode=mode)

    # -- time and memory ---------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Wait for everything queued on the device."""

    def time(self, run: Run, count: int, inner: int = 1, ahead: float = 0.0) -> Turn:
        """Time `count` samples of `inner` runs each; return the seconds of one run in each.

        Without `ahead`, runs are queued as a program would: a device that waits for Python is part
        of the time. Else the device is kept busy while they are queued, for which one needs about
        `ahead` seconds: the time is the device's alone.
        """
        raise NotImplementedError

    def watch_memory(self, make: Callable[[], Run]) -> tuple[Run, float, Memory]:
        """Make a run and run it twice; return it, the first run's seconds, and what it took."""
        raise NotImplementedError

    def shown_to_profilers(self) -> AbstractContextManager[Any]:
        """Return a context whose launches a profiler sees that was told to wait for one."""
        return nullcontext()

    def free(self) -> None:
        """Give back what nobody uses."""
        gc.collect()

    # -- what it is --------------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """Return names and versions of all that takes part."""
        known = {
            "python": platform.python_version,
            "commit": commit,
            "numpy": lambda: np.__version__,
            "gradengine": lambda: ge.__version__,
        }
        if self.torch is not None:
            known["torch"] = lambda: self.torch.__version__
        return {name: _or_none(read) for name, read in (known | self._known()).items()}

    def _known(self) -> dict[str, Callable[[], Any]]:
        """Return what reads each name and version of a device's own."""
        return {}

    def clocks(self) -> str | None:
        """Return clocks, temperature and power, by which a throttled run is recognized."""
        return None


class Rehearsal(Device):
    """No GPU: runs happen on the CPU, as few as can be, and made-up numbers say what they took."""

    rounds = (1, 1)
    blocks = (1, 1, 1, 1)

    def __init__(self, torch: Any = None) -> None:
        self.torch = torch

    def dtype(self, precision: str) -> Any:
        return np.dtype(np.float32)  # the CPU's kernels know no bfloat16

    def fast_matmul(self) -> None:
        pass

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def capture(self, step: Run) -> Run:
        return step

    def torch_capture(self, step: Run) -> Run:
        return step

    def torch_compile(self, function: Callable[..., Any], mode: str) -> Callable[..., Any]:
        return self.torch.compile(function, backend="eager")

    def time(self, run: Run, count: int, inner: int = 1, ahead: float = 0.0) -> Turn:
        return Turn([1e-3] * count, 1e-5)

    def watch_memory(self, make: Callable[[], Run]) -> tuple[Run, float, Memory]:
        run = make()
        run()
        return run, 1.0, Memory(1_000_000, 2_000_000)

    def _known(self) -> dict[str, Callable[[], Any]]:
        return {"device": lambda: "rehearsal without a GPU"}


class Cuda(Device):
    """The current CUDA device, under CuPy and, where it is installed, PyTorch.

    Both issue their work to the default stream, so that one clock serves both.
    """

    name = "cuda"

    def __init__(self, torch: Any = None) -> None:
        import cupy  # pyright: ignore[reportMissingImports]

        self.xp = cupy
        self.torch = torch
        self._spin = cupy.RawKernel(SPIN, "spin")
        kilohertz = cupy.cuda.Device().attributes.get("ClockRate", 2_000_000)
        self._cycles = 1e3 * kilohertz  # a second
        settings.cuda.benchmark = True
        if torch is not None:
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")
        self._start()

    def _start(self) -> None:
        """Let both libraries load their own before the first row is timed."""
        ones = self.xp.ones((64, 64), self.xp.float32)
        self.xp.matmul(ones, ones)
        self._spin((1,), (1,), (np.int64(1000),))
        if self.torch is not None:
            tensor = self.to_torch(ones)
            self.torch.mm(tensor, tensor)
            self.torch.nn.functional.conv2d(tensor[None, None], tensor[None, None, :3, :3])
        self.synchronize()

    def synchronize(self) -> None:
        self.xp.cuda.runtime.deviceSynchronize()

    def time(self, run: Run, count: int, inner: int = 1, ahead: float = 0.0) -> Turn:
        spin = min(SPIN_LIMIT, 2 * ahead * count * inner + 1e-4) if ahead else 0.0
        while True:
            turn, wall, in_time = self._take(run, count, inner, spin)
            if in_time or 2 * spin > SPIN_LIMIT:
                break
            spin *= 2  # the device had to wait for a run: start it later
        elapsed = sum(turn.seconds) * inner
        if not ahead and wall > 1.25 * elapsed + 3e-4:
            # Work that the events did not enclose, on a stream that the default one does not wait for.
            return Turn([wall / (count * inner)] * count, turn.queueing)
        return turn

    def _take(self, run: Run, count: int, inner: int, spin: float) -> tuple[Turn, float, bool]:
        """Return a turn, its seconds by the host's clock, and whether all was queued in time."""
        cuda = self.xp.cuda
        stream = cuda.Stream.null
        events = [cuda.Event() for _ in range(count + 1)]
        self.synchronize()
        start = time.perf_counter()
        if spin:
            self._spin((1,), (1,), (np.int64(spin * self._cycles),))
        begin = time.perf_counter()
        events[0].record(stream)
        for event in events[1:]:
            for _ in range(inner):
                run()
            event.record(stream)
        queued = time.perf_counter()
        self.synchronize()
        wall = time.perf_counter() - start
        seconds = [1e-3 * cuda.get_elapsed_time(*pair) / inner for pair in pairwise(events)]
        turn = Turn(seconds, (queued - begin) / (count * inner))
        return turn, wall, not spin or queued - start < spin

    def watch_memory(self, make: Callable[[], Run]) -> tuple[Run, float, Memory]:
        self.free()
        free, _ = self.xp.cuda.runtime.memGetInfo()
        before = self.torch.cuda.memory_allocated() if self.torch else 0
        peak = _peak_hook(self.xp)
        start = time.perf_counter()
        with peak:
            run = make()
            run()
            self.synchronize()
            first = time.perf_counter() - start
            if self.torch:  # the first run also tries cuDNN's algorithms out
                self.torch.cuda.reset_peak_memory_stats()
            run()
            self.synchronize()
        theirs = self.torch.cuda.max_memory_allocated() - before if self.torch else 0
        left, _ = self.xp.cuda.runtime.memGetInfo()
        return run, first, Memory(max(peak.peak, theirs), free - left)

    def shown_to_profilers(self) -> AbstractContextManager[Any]:
        from cupyx.profiler import profile  # pyright: ignore[reportMissingImports]

        return profile()

    def free(self) -> None:
        super().free()
        self.synchronize()
        self.xp.get_default_memory_pool().free_all_blocks()
        if self.torch is not None:
            self.torch.cuda.empty_cache()

    def _known(self) -> dict[str, Callable[[], Any]]:
        from cupy.cuda import nvrtc  # pyright: ignore[reportMissingImports]

        runtime, torch = self.xp.cuda.runtime, self.torch
        properties = runtime.getDeviceProperties(runtime.getDevice())
        known = {
            "device": properties["name"].decode,
            "multiprocessors": lambda: properties["multiProcessorCount"],
            "memory_bytes": lambda: properties["totalGlobalMem"],
            "l2_bytes": lambda: properties["l2CacheSize"],
            "driver": driver_version,
            "clocks": self.clocks,
            "cuda": lambda: cuda_version(runtime.runtimeGetVersion()),
            "cupy": lambda: self.xp.__version__,
            "nvrtc": lambda: ".".join(map(str, nvrtc.getVersion())),
        }
        if torch is not None:
            known["torch_cuda"] = lambda: torch.version.cuda
            known["cudnn"] = torch.backends.cudnn.version
        return known

    def clocks(self) -> str | None:
        fields = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
        found = _output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"])
        return re.sub(r"\s+", " ", found.splitlines()[0]) if found else None


def _peak_hook(cupy: Any) -> Any:
    """Return a context that notes the most bytes that CuPy's pools had handed out inside of it."""

    class Peak(cupy.cuda.MemoryHook):
        name = "peak"
        live = peak = 0

        def malloc_postprocess(self, **block: Any) -> None:
            if block["mem_ptr"]:
                self.live += block["mem_size"]
                self.peak = max(self.peak, self.live)

        def free_postprocess(self, **block: Any) -> None:
            self.live -= block["mem_size"]

    return Peak()


def commit() -> str | None:
    """Return the commit that is measured, or None outside of a checkout."""
    return _output(["git", "describe", "--always", "--dirty", "--abbrev=12"])


def driver_version() -> str | None:
    found = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return found.splitlines()[0] if found else None


def _or_none(read: Callable[[], Any]) -> Any:
    """Return what can be read: nothing of what a file of results says is worth a lost run."""
    try:
        return read()
    except Exception:
        return None


def _output(command: list[str]) -> str | None:
    """Return what a command prints, or None where it is missing or fails."""
    try:
        found = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
