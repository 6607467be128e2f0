"""Rows of single kernels: the device's limits, convolutions, matrix products."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.gpu_device import Device, Run
from benchmarks.gpu_race import COUNT, Contestant, Row
from gradengine import kernels
from gradengine.kernels import settings
from gradengine.kernels.cuda import conv2d, conv2d_weight, tuning
from gradengine.kernels.cuda.launch import Limits, device_limits
from gradengine.kernels.cuda.tiles import TensorTile
from gradengine.kernels.geometry import conv2d_geometry

BATCH = 256
# ResNet-18's: (input channels, output channels, input size, kernel, stride)
CONVOLUTIONS = [
    (64, 64, 56, 3, 1),
    (128, 128, 28, 3, 1),
    (256, 256, 14, 3, 1),
    (512, 512, 7, 3, 1),
    (3, 64, 224, 7, 2),
    (64, 128, 56, 3, 2),
    (128, 256, 28, 3, 2),
    (256, 512, 14, 3, 2),
    (64, 128, 56, 1, 2),
    (128, 256, 28, 1, 2),
    (256, 512, 14, 1, 2),
]
PASSES = {
    "forward": (False, False),
    "gradient by input": (True, False),
    "gradient by weight": (False, True),
}
PRECISIONS = ("bf16", "tf32")
# PyTorch's setting for products of float32 matrices.
PRODUCTS = {"fp32": "highest", "tf32": "high", "bf16": "high"}
TILE_SAMPLES = 5
REHEARSED = Limits(architecture=90, multiprocessors=132, shared_bytes=227 << 10)
COPIED = 1 << 30  # bytes
# M x K by K x N; T marks the operand that is a transposed view.
MATRICES = [
    (4096, 4096, 4096, "NN"),
    (8192, 8192, 8192, "NN"),
    (1024, 1024, 1024, "NN"),
    (4096, 4096, 4096, "NT"),
    (4096, 4096, 4096, "TN"),
    (256, 512, 1000, "NT"),  # ResNet-18's last layer, forward
    (256, 1000, 512, "NN"),  # its gradient by input
    (1000, 256, 512, "TN"),  # and by weight
    (802816, 64, 64, "NN"),  # many pixels, few channels
]


@dataclass
class Sizes:
    """How large the rows are: a rehearsal divides images by 7 and everything else by 64."""

    rehearsal: bool = False

    @property
    def batch(self) -> int:
        return 2 if self.rehearsal else BATCH

    def pixels(self, size: int) -> int:
        return -(-size // 7) if self.rehearsal else size

    def length(self, size: int) -> int:
        return -(-size // 64) if self.rehearsal else size


def torch_only(device: Device, *contestants: Contestant) -> list[Contestant]:
    """Return the contestants where PyTorch is installed, else none."""
    return list(contestants) if device.torch is not None else []


# ---- what the device can do ----------------------------------------------------------------------


def limit_rows(device: Device, sizes: Sizes) -> Iterator[Row]:
    """Yield the copy bandwidth, and the rate of cuBLAS at two sizes in three precisions."""
    count = sizes.length(COPIED) // 4
    copies = [
        Contestant("CuPy", lambda: _cupy_copy(device, count)),
        *torch_only(device, Contestant("PyTorch", lambda: _torch_copy(device, count))),
    ]
    yield Row("limits", "copy", copies, moved=8.0 * count, labels={"limit": "copy"})
    for precision in PRODUCTS:
        for size in (8192, 4096):
            side = sizes.length(size)
            shape = (side, side, side, "NN")
            products = [
                *torch_only(device, _torch_product(device, shape, precision, "PyTorch")),
                _cupy_product(device, shape, precision),
            ]
            labels = {"limit": precision, "size": size}
            name = f"cuBLAS {precision}, {size} x {size}"
            yield Row("limits", name, products, flop=2.0 * side**3, labels=labels)


def _cupy_copy(device: Device, count: int) -> Run:
    source = device.random((count,), np.float32)
    target = device.xp.empty_like(source)
    return lambda: device.xp.copyto(target, source)


def _torch_copy(device: Device, count: int) -> Run:
    source = device.to_torch(device.random((count,), np.float32))
    target = device.torch.empty_like(source)
    return lambda: target.copy_(source)


def _cupy_product(device: Device, shape: tuple[Any, ...], precision: str) -> Contestant:
    def make() -> Run:
        x, y = _operands(device, shape, precision)
        out = device.xp.empty((x.shape[0], y.shape[1]), x.dtype)
        core: Any = getattr(device.xp, "_core", None)
        if precision != "tf32" or not hasattr(core, "set_compute_type"):  # NumPy has no such thing
            return lambda: device.xp.matmul(x, y, out=out)
        usual, tf32 = core.get_compute_type(x.dtype), _tf32_compute_type()

        def run() -> None:
            core.set_compute_type(x.dtype, tf32)
            device.xp.matmul(x, y, out=out)
            core.set_compute_type(x.dtype, usual)

        return run

    return Contestant("CuPy", make)


def _tf32_compute_type() -> int:
    """Return CuPy's number for TF32: it has names for these numbers, but only in C."""
    from cupy._core import _routines_linalg as linalg  # pyright: ignore[reportMissingImports]

    names = map(linalg.compute_type_to_str, range(16))
    return list(names).index("COMPUTE_TYPE_TF32")


def _torch_product(device: Device, shape: tuple[Any, ...], precision: str, name: str) -> Contestant:
    def make() -> Run:
        torch = device.torch
        x, y = map(device.to_torch, _operands(device, shape, precision))
        out = torch.empty((x.shape[0], y.shape[1]), dtype=x.dtype, device=x.device)
        setting = PRODUCTS[precision]

        def run() -> Any:
            torch.set_float32_matmul_precision(setting)
            torch.mm(x, y, out=out)
            torch.set_float32_matmul_precision("high")
            return out

        return run

    return Contestant(name, make)


def _operands(device: Device, shape: tuple[Any, ...], precision: str) -> tuple[Any, Any]:
    """Return x (M, K) and y (K, N), transposed views of C-contiguous memory where the kind says T."""
    rows, inner, columns, kind = shape
    dtype = device.dtype(precision)
    x = device.random((inner, rows) if kind[0] == "T" else (rows, inner), dtype)
    y = device.random((columns, inner) if kind[1] == "T" else (inner, columns), dtype, seed=1)
    return x.T if kind[0] == "T" else x, y.T if kind[1] == "T" else y


# ---- matrix products -----------------------------------------------------------------------------


def matmul_rows(device: Device, sizes: Sizes) -> Iterator[Row]:
    """Yield products of this package beside cuBLAS as PyTorch calls it."""
    for precision in PRECISIONS:
        for rows, inner, columns, kind in MATRICES:
            shape = (sizes.length(rows), sizes.length(inner), sizes.length(columns), kind)
            contestants = [
                _our_product(device, shape, precision),
                *torch_only(device, _torch_product(device, shape, precision, "cuBLAS")),
            ]
            yield Row(
                "matmul",
                f"{precision} {rows} x {inner} by {inner} x {columns}, {kind}",
                contestants,
                flop=2.0 * shape[0] * shape[1] * shape[2],
                labels={"precision": precision},
                check=lambda runs: _distance(device, runs, "cuBLAS"),
                importance=23,
            )


def _our_product(device: Device, shape: tuple[Any, ...], precision: str) -> Contestant:
    def make() -> Run:
        device.fast_matmul()
        x, y = _operands(device, shape, precision)
        return lambda: kernels.matmul(x, y)

    return Contestant("gradengine", make)


def _distance(device: Device, runs: dict[str, Run], peer: str) -> dict[str, dict[str, float]]:
    """Return how far our result is from a peer's: a fast kernel that is wrong must show."""
    if "gradengine" not in runs or peer not in runs:
        return {}
    return {"gradengine": {"distance": device.distance(runs["gradengine"](), runs[peer]())}}


# ---- convolutions --------------------------------------------------------------------------------


def convolution_rows(device: Device, sizes: Sizes) -> Iterator[Row]:
    """Yield each pass of each convolution beside cuDNN in both memory layouts."""
    for case in _convolutions(device, sizes, PASSES):
        peers = (Contestant(f"cuDNN {kind}", case.theirs(kind)) for kind in ("nhwc", "nchw"))
        yield Row(
            "convolutions",
            case.name,
            [Contestant("gradengine", case.ours), *torch_only(device, *peers)],
            flop=case.flop,
            moved=case.moved,
            labels=case.labels,
            check=lambda runs: _distance(device, runs, "cuDNN nhwc"),
            importance=20 + 0.1 * list(PASSES).index(case.which),
        )


def _convolutions(device: Device, sizes: Sizes, passes: Iterable[str]) -> Iterator[_Convolution]:
    for which in passes:
        for precision in PRECISIONS:
            for shape in CONVOLUTIONS:
                if shape[0] == 3 and which == "gradient by input":
                    continue  # nobody asks for the gradient by the images
                yield _Convolution(device, sizes, precision, which, shape)


class _Convolution:
    """One pass of one convolution: its arrays are made when the first contestant asks for them."""

    def __init__(
        self, device: Device, sizes: Sizes, precision: str, which: str, shape: tuple[int, ...]
    ) -> None:
        inputs, outputs, size, kernel, stride = shape
        self.device, self.precision, self.which, self.stride = device, precision, which, stride
        what = f"{kernel}x{kernel} stride {stride}, {inputs} to {outputs}, {size} px"
        self.name = f"{precision} {which}, {what}"
        self.labels = {"precision": precision, "pass": which, "convolution": what}
        pixels = sizes.pixels(size)
        self.shapes = ((sizes.batch, inputs, pixels, pixels), (outputs, inputs, kernel, kernel))
        self.geometry = conv2d_geometry(*self.shapes, stride, kernel // 2, 1, 1)
        sizes_of = [int(np.prod(s)) for s in (*self.shapes, self.geometry.output_shape)]
        self.flop = 2.0 * sizes_of[2] * inputs * kernel**2
        self.itemsize = 2 if precision == "bf16" else 4
        self.moved = float(self.itemsize * sum(sizes_of))

    def arrays(self) -> tuple[Any, Any, Any]:
        """Return x, weight and grad, the same numbers for all, channels last."""
        dtype = self.device.dtype(self.precision)
        shapes = (*self.shapes, self.geometry.output_shape)
        x, weight, grad = (
            self.device.random_nhwc(shape, dtype, seed) for seed, shape in enumerate(shapes)
        )
        return x, weight, grad

    def ours(self) -> Run:
        self.device.fast_matmul()
        x, weight, grad = self.arrays()
        geometry = self.geometry
        return {
            "forward": lambda: kernels.conv2d(x, weight, None, geometry),
            "gradient by input": lambda: kernels.conv2d_grad_input(grad, weight, geometry),
            "gradient by weight": lambda: kernels.conv2d_grad_weight(grad, x, geometry),
        }[self.which]

    def theirs(self, layout: str) -> Callable[[], Run]:
        def make() -> Run:
            torch = self.device.torch
            tensors = map(self.device.to_torch, self.arrays())
            if layout == "nchw":
                tensors = (tensor.contiguous() for tensor in tensors)
            x, weight, grad = tensors
            stride, padding = [self.stride] * 2, [weight.shape[2] // 2] * 2
            if self.which == "forward":
                return lambda: torch.nn.functional.conv2d(x, weight, None, stride, padding)
            mask = (*PASSES[self.which], False)
            place = mask.index(True)
            geometry = (stride, padding, [1, 1], False, [0, 0], 1)
            backward = torch.ops.aten.convolution_backward
            return lambda: backward(grad, x, weight, None, *geometry, mask)[place]

        return make


def tile_rows(device: Device, sizes: Sizes) -> Iterator[Row]:
    """Yield each pass of each convolution in every tile, or way, that the device can compute.

    To compile them takes longer than all else: `python -m gradengine compile` does it ahead.
    """
    for case in _convolutions(device, sizes, PASSES):
        yield Row(
            "tiles",
            case.name,
            [],
            COUNT,
            flop=case.flop,
            labels=case.labels,
            check=lambda runs, case=case: _times_of_tiles(device, case),
            importance=50,
        )


def _times_of_tiles(device: Device, case: _Convolution) -> dict[str, dict[str, float]]:
    """Return the median of each tile, and of what the rule chooses, the shortest first."""
    run = case.ours()
    limits = device_limits() if device.name == "cuda" else REHEARSED
    if case.which == "gradient by weight":
        ways = conv2d_weight.possible_ways(case.geometry, case.itemsize, limits)
        runs = {_way_name(way): _imposed(run, way) for way in ways}
    else:
        which = "forward" if case.which == "forward" else "gradient"
        tiles = conv2d.possible_tiles(limits, conv2d.window_of(which, case.geometry, case.itemsize))
        runs = {_tile_name(tile): _imposed(run, tile) for tile in tiles}
    runs["by the rule"] = _timing(False, run)
    found = {name: _median(device, one) for name, one in runs.items()}
    return {name: {"median": found[name]} for name in sorted(found, key=found.__getitem__)}


def _median(device: Device, run: Run) -> float:
    run()  # compiles and loads
    ahead = max(device.time(run, 2).queueing, 1e-6)
    return statistics.median(device.time(run, TILE_SAMPLES, 1, ahead).seconds)


def _imposed(run: Run, choice: TensorTile | conv2d_weight.Way) -> Run:
    def run_so() -> Any:
        with tuning.imposed(choice):
            return run()

    return _timing(True, run_so)


def _timing(on: bool, run: Run) -> Run:
    """Return `run` with tiles timed or chosen by the rule."""

    def run_so() -> Any:
        before = settings.cuda.benchmark
        settings.cuda.benchmark = on
        try:
            return run()
        finally:
            settings.cuda.benchmark = before

    return run_so


def _tile_name(tile: TensorTile) -> str:
    kind = " warpgroups" if conv2d.by_warpgroups(tile) else ""
    kind = " window" if tile in conv2d.WINDOW_TILES else kind
    return f"{tile.rows}x{tile.columns}{kind}"


def _way_name(way: conv2d_weight.Way) -> str:
    if isinstance(way, TensorTile):
        return f"{way.rows}x{way.columns} gathered"
    if way == conv2d_weight.PLACES:
        return "places"
    return "window warpgroups" if isinstance(way, conv2d_weight.WarpgroupTile) else "window"
