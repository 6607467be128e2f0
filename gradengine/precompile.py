"""Compiling kernels ahead of their first use: ``python -m gradengine compile``."""

from __future__ import annotations

import time
from itertools import product

import gradengine as ge
from gradengine import nn
from gradengine.devices import cupy_problem
from gradengine.kernels.cache_folder import private_cache_folder
from gradengine.kernels.cpu import code_cache

_SIDES = (64, 224)  # pixels: kernels are chosen by shape


def compile_cpu_kernels() -> None:
    """Compile what training and evaluating a ResNet and multiplying matrices need, in float32.

    Prints each function that is compiled and the seconds it took, then how many and the total.
    What an earlier process compiled is loaded from disk and not printed.
    """
    names: list[str] = []

    def tell(name: str, seconds: float) -> None:
        names.append(name)
        print(f"{name:40}{seconds:6.1f} s", flush=True)

    started = time.perf_counter()
    code_cache.on_compiled = tell
    device = ge.default_device()
    ge.set_default_device("cpu")
    try:
        for side in _SIDES:
            _use_network(side)
        _multiply_matrices()
    finally:
        ge.set_default_device(device)
        code_cache.on_compiled = None
    print(
        f"{len(names)} functions compiled, {time.perf_counter() - started:.1f} s; {_kept('NUMBA')}"
    )


def compile_cuda_kernels(architecture: str) -> None:
    """Compile all CUDA kernels for GPUs of an architecture, such as "sm_90a", with CuPy's compiler.

    Prints each kernel and the seconds it took; one that was compiled before takes none. Raises
    RuntimeError where CuPy or the compiler is not there, ValueError for an unknown architecture.
    """
    from gradengine.kernels.cuda.compiler import check_architecture, compile_ahead

    reason = cupy_problem()
    if reason is not None:
        raise RuntimeError(f"compile: {reason}")
    check_architecture(architecture)
    started = time.perf_counter()
    names = []
    for name, seconds in compile_ahead(architecture):
        names.append(name)
        print(f"{name:70}{seconds:6.1f} s", flush=True)
    print(f"{len(names)} kernels, {time.perf_counter() - started:.1f} s; {_kept('CUPY')}")


def _use_network(side: int) -> None:
    """Train a ResNet-18 for a step, evaluate it, and train its last layer alone."""
    model = ge.models.resnet18(num_classes=10)
    images, labels = ge.randn(2, 3, side, side), ge.asarray([0, 1])
    _step(model, images, labels)
    model.eval()
    with ge.no_grad():
        model(images)
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    _step(model, images, labels)


def _step(model: nn.Module, images: ge.Tensor, labels: ge.Tensor) -> None:
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = ge.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=1e-4)
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()


def _multiply_matrices() -> None:
    """Multiply square, flat and batched matrices in either order of memory, with gradients."""
    for (rows, size), batch in product(((48, 48), (48, 600), (600, 600)), ((), (2,))):
        for a_swapped, b_swapped in product((False, True), repeat=2):
            a, b = ge.ones(*batch, rows, size), ge.ones(*batch, size, size)
            left = a.transpose(-1, -2).contiguous().transpose(-1, -2) if a_swapped else a
            right = b.transpose(-1, -2) if b_swapped else b
            (left.requires_grad_() @ right.requires_grad_()).sum().backward()


def _kept(compiler: str) -> str:
    try:
        return f"all are kept in {private_cache_folder(compiler)}"
    except OSError as error:
        return f"none can be kept: {error}"
