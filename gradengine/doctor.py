"""What gradengine finds on this machine, and what is missing: ``python -m gradengine doctor``."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from gradengine.devices import (
    ENVIRONMENT_VARIABLE,
    cuda_is_available,
    cuda_unavailable_reason,
    cuda_version,
    default_device,
    device_count,
    import_cupy,
)
from gradengine.kernels.cache_folder import cache_folder
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.weights.download import weights_folder

OPTIONAL_PACKAGES = ("pillow", "tqdm", "matplotlib", "scikit-learn", "safetensors", "scipy")


def report() -> str:
    """Return the report, one ``name: finding`` a line. A part that fails says so in its line."""
    rows: list[tuple[str, Callable[[], str]]] = [
        ("python", _python),
        ("gradengine", _gradengine),
        ("numpy", _numpy),
        ("numba", _numba),
        ("cupy", _cupy),
        ("cuda", _cuda),
        ("default device", _default_device),
        *((name, lambda name=name: _optional_package(name)) for name in OPTIONAL_PACKAGES),
        ("cpu kernel cache", lambda: _folder(cache_folder())),
        ("cupy kernel cache", lambda: _folder(_cupy_cache())),
        ("weights cache", lambda: _folder(weights_folder())),
    ]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name + ':':{width}}{_finding(row)}" for name, row in rows)


def _finding(row: Callable[[], str]) -> str:
    try:
        return row()
    except Exception as error:  # a broken part must not hide the others
        return f"failed: {type(error).__name__}: {error}"


def _python() -> str:
    return f"{platform.python_version()} on {platform.platform()} ({sys.executable})"


def _gradengine() -> str:
    folder = Path(__file__).parent
    try:
        return f"{metadata.version('gradengine')} ({folder})"
    except metadata.PackageNotFoundError:
        return f"not installed, run from {folder}"


def _numpy() -> str:
    configuration: dict[str, Any] = np.show_config(mode="dicts")  # pyright: ignore[reportAssignmentType]
    blas = configuration["Build Dependencies"]["blas"]
    return f"{np.__version__}, BLAS {blas['name']} {blas['version']}"


def _numba() -> str:
    import numba

    return f"{numba.__version__}, {get_num_threads()} threads"


def _cupy() -> str:
    try:
        return import_cupy().__version__
    except ModuleNotFoundError:
        return "missing: pip install 'gradengine[cuda12]'"


def _cuda() -> str:
    reason = cuda_unavailable_reason()
    if reason is not None:
        return f"not usable: {reason}"
    cupy = import_cupy()
    runtime = cupy.cuda.runtime
    gpus = "; ".join(_gpu(cupy, index) for index in range(device_count()))
    return (
        f"driver {cuda_version(runtime.driverGetVersion())}, "
        f"runtime {cuda_version(runtime.runtimeGetVersion())}; {gpus}"
    )


def _gpu(cupy: Any, index: int) -> str:
    gpu = cupy.cuda.Device(index)
    free, total = (size / 2**30 for size in gpu.mem_info)
    name = cupy.cuda.runtime.getDeviceProperties(index)["name"].decode()
    return (
        f"cuda:{index} {name}, compute capability {gpu.compute_capability}, "
        f"{free:.1f} of {total:.1f} GiB free"
    )


def _default_device() -> str:
    device = default_device()
    if os.environ.get(ENVIRONMENT_VARIABLE):
        return f"{device} (the environment variable {ENVIRONMENT_VARIABLE} names it)"
    return f"{device} ({'CUDA is usable' if cuda_is_available() else 'CUDA is not usable'})"


def _optional_package(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"missing: pip install {name}"


def _cupy_cache() -> Path:
    return Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")


def _folder(folder: Path) -> str:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return f"{folder} ({'writable' if writable else 'not writable'})"
