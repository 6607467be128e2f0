"""No two threads of a CUDA kernel access the same bytes at once, one of them to write.

Every access is watched, so a race shows whatever order the threads run in. One call of each kernel of
the seam, of sizes that take more than one block, tile and pass; ``python -m tests.emulator.watch``
watches all other tests of emulated kernels.
"""

import inspect
from pathlib import Path

import numpy as np
import pytest

from gradengine import kernels
from gradengine.kernels import settings
from gradengine.kernels.cuda import conv2d
from gradengine.kernels.geometry import conv2d_geometry, pool2d_geometry

BFLOAT16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
DTYPES = (np.dtype(np.float32), BFLOAT16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def draw(emulated_cuda, rng):
    """Give a function that draws arrays in channels-last memory; kernels are watched."""
    emulated_cuda.watched = True

    def make(shape, dtype):
        array = rng.standard_normal(shape).astype(np.float32).astype(dtype)
        return np.moveaxis(array, -1, 1) if array.ndim == 4 else array

    yield make
    assert emulated_cuda.accesses()


CONVOLUTIONS = {
    "square": ((2, 64, 9, 8), (72, 64, 3, 3), 1, 1, 1, 1),
    "stride": ((2, 32, 9, 8), (136, 32, 3, 3), 2, 1, 1, 1),
    "stem": ((2, 3, 18, 20), (64, 3, 7, 7), 2, 3, 1, 1),
    "groups": ((2, 64, 5, 4), (48, 32, 3, 3), 1, 1, 1, 2),
    "plain": ((2, 5, 7, 6), (6, 5, 3, 2), 1, 1, 2, 1),
}


@every_dtype
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv2d(case, dtype, draw):
    geometry = conv2d_geometry(*CONVOLUTIONS[case])
    n, c, h, w = geometry.input_shape
    x = draw((n, h, w, c), dtype)
    weight = draw(
        geometry.weight_shape[:1] + geometry.weight_shape[2:] + geometry.weight_shape[1:2], dtype
    )
    bias = draw((geometry.out_channels,), dtype)
    out = kernels.conv2d(x, weight, bias, geometry, relu=True)
    grad = kernels.conv2d(x, weight, None, geometry, residual=out)
    kernels.conv2d_moments(x, weight, bias, geometry)
    kernels.conv2d_grad_input(grad, weight, geometry)
    assert np.isfinite(kernels.conv2d_grad_weight(grad, x, geometry).astype(np.float32)).all()


@every_dtype
@pytest.mark.parametrize("tile", conv2d.WINDOW_TILES, ids=str)
def test_conv2d_with_windows(tile, dtype, draw, monkeypatch):
    for plan in (conv2d._forward_plan, conv2d._grad_input_plan):
        monkeypatch.setattr(conv2d, plan.__name__, plan.__wrapped__)  # not from the cache
    monkeypatch.setattr(conv2d, "_choose_tile", lambda *_: tile)
    geometry = conv2d_geometry((3, 72, 9, 8), (72, 72, 3, 3), 1, 1)
    x, weight = draw((3, 9, 8, 72), dtype), draw((72, 3, 3, 72), dtype)
    out, _, _ = kernels.conv2d_moments(x, weight, None, geometry)
    assert np.isfinite(kernels.conv2d_grad_input(out, weight, geometry).astype(np.float32)).all()


@every_dtype
@pytest.mark.parametrize("channels", [16, 5])
def test_pooling(channels, dtype, draw):
    geometry = pool2d_geometry("max_pool2d", (2, channels, 9, 8), 3, 2, 1)
    x = draw((2, 9, 8, channels), dtype)
    out, indices = kernels.max_pool2d(x, geometry)
    kernels.max_pool2d_gather(x, indices, geometry)
    kernels.max_pool2d_scatter(out, indices, geometry)
    kernels.avg_pool2d_grad(kernels.avg_pool2d(x, geometry), geometry)


@every_dtype
@pytest.mark.parametrize("shape", [(2, 9, 7, 64), (3, 5, 4, 6), (1, 40, 40, 8)])
def test_batch_norm(shape, dtype, draw):
    x, residual = draw(shape, dtype), draw(shape, dtype)
    weight, bias = draw(shape[-1:], np.float32), draw(shape[-1:], np.float32)
    if dtype == np.float32:
        kernels.scale_shift(x, weight, bias, residual, True)
    weight, bias = weight.astype(dtype), bias.astype(dtype)
    out, mean, inv_std, passed = kernels.batch_norm_act(x, weight, bias, residual, True, 1e-5)
    grads = (residual, x, out, passed, weight, mean, inv_std)
    kernels.batch_norm_act_grad(*grads, relu=True, wants_residual=True)


@every_dtype
@pytest.mark.parametrize("channels", [16, 5])
def test_batch_norm_relu_max_pool(channels, dtype, draw):
    geometry = pool2d_geometry("max_pool2d", (2, channels, 10, 8), 3, 2, 1)
    x, (weight, bias) = draw((2, 10, 8, channels), dtype), draw((2, channels), dtype)
    results = kernels.batch_norm_relu_max_pool(x, weight, bias, 1e-5, geometry)
    out, mean, inv_std, winners, peaks = results
    kernels.winning_positions(winners, geometry)
    grads = (out, x, out, winners, peaks, weight, bias, mean, inv_std)
    kernels.batch_norm_relu_max_pool_grad(*grads, geometry)


@every_dtype
@pytest.mark.parametrize("classes", [10, 300])
def test_softmax_cross_entropy(classes, dtype, draw):
    x, grad = draw((9, classes), dtype), draw((9,), dtype)
    target = np.arange(9) % classes
    target, _ = kernels.class_scale(target, draw((classes,), dtype), 3, classes, x.dtype)
    _, shifts = kernels.softmax_cross_entropy(x, target)
    kernels.softmax_cross_entropy_grad(grad, x, target, shifts)


@every_dtype
@pytest.mark.parametrize("shape", [(9, 64), (3, 300), (5, 17), (70, 33)])
def test_rows(shape, dtype, draw):
    x, grad, weight = draw(shape, dtype), draw(shape, dtype), draw(shape[1:], dtype)
    kernels.softmax_grad(grad, kernels.softmax(x))
    kernels.log_softmax_grad(grad, kernels.log_softmax(x))
    _, mean, inv_std = kernels.layer_norm(x, weight, weight, 1e-5)
    kernels.layer_norm_grad(grad, x, weight, mean, inv_std)


@every_dtype
@pytest.mark.parametrize(
    "shapes", [((70, 64), (64, 72)), ((3, 5, 7), (7, 2)), ((2, 200, 40), (40, 8))]
)
def test_matmul(shapes, dtype, draw):
    x, y = (draw(shape, dtype) for shape in shapes)
    kernels.matmul(x, y)
    kernels.matmul(x.swapaxes(-1, -2), kernels.matmul(x, y))


@pytest.mark.parametrize("size", [1000, 4096])
def test_elementwise_and_optimizers(size, draw):
    x, grad, velocity, square = (draw((size,), np.float32) for _ in range(4))
    kernels.relu_grad(grad, kernels.erf(x))
    for name in ("relu", "sigmoid", "silu", "gelu", "gelu_tanh"):
        kernels.elementwise(name, x)
    for name in ("sigmoid_grad", "tanh_grad", "silu_grad", "gelu_grad", "gelu_tanh_grad"):
        kernels.elementwise(name, grad, x)
    options = {"lr": 0.1, "weight_decay": 1e-4, "maximize": False}
    sgd = {"momentum": 0.9, "dampening": 0.0, "nesterov": True}
    values, grads, velocities = [x, velocity[:7]], [grad, square[:7]], [velocity, x[:7].copy()]
    kernels.sgd(values, grads, velocities, [False, True], options | sgd)
    adam = {"betas": (0.9, 0.999), "eps": 1e-8}
    averages = [x], [grad], [velocity], [np.abs(square)]
    kernels.adam(*averages, [{"step": 3}], options | adam, decoupled=False)
    kernels.unscale([grad], 0.5)
    kernels.cast_all([x, grad[:7]], BFLOAT16)


@every_dtype
def test_weigh(dtype, draw, rng):
    x = draw((2, 6, 7, 8), dtype)
    positions, weights = rng.integers(-1, 7, (5, 3)), rng.random((5, 3))
    kernels.weigh(x, positions, weights, 3)


@every_dtype
def test_random(dtype, draw):
    out = draw((2, 3, 2051), dtype)
    take = lambda blocks: (1, 2)  # noqa: E731
    kernels.random_uniform(out, take)
    kernels.random_normal(out, take)
    kernels.random_integers(np.zeros(1027, np.int64), 0, 9, take)
    kernels.random_bernoulli(np.zeros(2051, np.bool_), 0.5, take)


@every_dtype
def test_positions(dtype, draw, rng, monkeypatch):
    monkeypatch.setattr(settings.general, "deterministic", True)
    positions = rng.integers(0, 40, 700)
    kernels.add_at("add", np.zeros(40, np.float32), positions, draw((700,), dtype))
    kernels.put_at("put", np.zeros(40, dtype), positions, draw((700,), dtype))


def test_every_kernel_is_watched():
    text = Path(__file__).read_text()
    functions = inspect.getmembers(kernels, inspect.isfunction)
    names = {name for name, function in functions if function.__module__ == kernels.__name__}
    called = {name for name in names if f"kernels.{name}(" in text}
    on_the_cpu = {"copy_in_order", "sum_over"}
    assert {name for name in names - called - on_the_cpu if not name.startswith("_")} == {
        *("has_kernels", "has_row_kernels", "pack_conv2d", "place")
    }
