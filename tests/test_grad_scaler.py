"""GradScaler beside PyTorch's: scales, skipped steps, the order of calls, states."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine import kernels
from gradengine.nn import functional as F
from gradengine.optim import SGD, Adam
from tests.test_cuda_graph import gpu  # noqa: F401 - a fixture


def parameter(*values: float) -> ge.Tensor:
    return ge.tensor(list(values), device="cpu", requires_grad=True)


def backward(scaler: Any, tensor: ge.Tensor, factor: float = 1.0) -> None:
    tensor.grad = None
    scaler.scale((tensor * factor).sum()).backward()


# ---- scales and steps ----------------------------------------------------------------------------


def test_a_step_is_that_of_unscaled_gradients():
    x, plain = parameter(1.0, -2.0), parameter(1.0, -2.0)
    scaler = ge.amp.GradScaler(init_scale=1024)
    optimizer, other = Adam([x], lr=0.1), Adam([plain], lr=0.1)
    for _ in range(3):
        for tensor, steps in ((x, optimizer), (plain, other)):
            steps.zero_grad()
            loss = (tensor**3).sum()
            (scaler.scale(loss) if tensor is x else loss).backward()
        assert x.grad.tolist() == [1024 * g for g in plain.grad.tolist()]
        assert scaler.step(optimizer) is None
        scaler.update()
        other.step()
        assert x.tolist() == plain.tolist()


@pytest.mark.pytorch
def test_scales_and_skipped_steps_are_pytorchs():
    torch = pytest.importorskip("torch")
    options: dict[str, Any] = {"init_scale": 2.0**120, "growth_factor": 4.0, "backoff_factor": 0.25}
    ours = ge.amp.GradScaler(**options, growth_interval=2)
    theirs = torch.amp.GradScaler("cpu", **options, growth_interval=2)
    x, y = parameter(1.0, 2.0), torch.tensor([1.0, 2.0], requires_grad=True)
    optimizer, other = SGD([x], lr=0.5), torch.optim.SGD([y], lr=0.5)
    rng = np.random.default_rng(0)
    for _ in range(40):
        factor = rng.choice([1.0, 2.0, np.inf, np.nan], p=[0.5, 0.3, 0.1, 0.1])
        with np.errstate(over="ignore", invalid="ignore"):  # it grows until the loss is infinite
            backward(ours, x, factor)
        y.grad = None
        theirs.scale((y * factor).sum()).backward()
        ours.step(optimizer)
        theirs.step(other)
        assert x.tolist() == y.tolist()
        ours.update()
        theirs.update()
        assert ours.state_dict() == theirs.state_dict()


def test_a_step_with_inf_or_nan_is_skipped():
    for bad in (np.inf, -np.inf, np.nan):
        x, y = parameter(1.0, 2.0), parameter(3.0)
        optimizer = SGD([x, y], lr=0.5)
        scaler = ge.amp.GradScaler(init_scale=8)
        scaler.scale(x.sum() + (y * bad).sum()).backward()
        scaler.step(optimizer)
        assert (x.tolist(), y.tolist()) == ([1, 2], [3])
        assert optimizer.step_count == 0
        scaler.update()
        assert scaler.get_scale() == 4


def test_each_optimizer_steps_by_its_own_gradients():
    x, y = parameter(1.0), parameter(1.0)
    first, second = SGD([x], lr=0.5), SGD([y], lr=0.5)
    scaler = ge.amp.GradScaler(init_scale=8)
    scaler.scale(x.sum() + (y * np.inf).sum()).backward()
    scaler.step(first)
    scaler.step(second)
    scaler.update()
    assert (x.tolist(), y.tolist(), scaler.get_scale()) == ([0.5], [1.0], 4)


def test_gradients_are_unscaled_to_be_clipped():
    x = parameter(3.0, 4.0)
    optimizer = SGD([x, parameter(1.0)], lr=1.0)  # one without a gradient
    scaler = ge.amp.GradScaler(init_scale=2.0**10)
    scaler.scale((x * x).sum() / 2).backward()
    scaler.unscale_(optimizer)
    assert x.grad.tolist() == [3, 4]
    norm = ge.nn.clip_grad_norm_([x], 1.0)
    assert norm.item() == 5
    scaler.step(optimizer)
    scaler.update()
    np.testing.assert_allclose(x.tolist(), [2.4, 3.2], rtol=1e-6)


def test_structures_of_outputs_are_scaled():
    scaler = ge.amp.GradScaler(init_scale=4)
    one, two = ge.tensor(1.0, device="cpu"), ge.tensor(2.0, device="cpu")
    scaled = scaler.scale([one, (two, one)])
    assert [scaled[0].item(), scaled[1][0].item(), scaled[1][1].item()] == [4, 8, 4]
    assert isinstance(scaled, list)
    assert isinstance(scaled[1], tuple)
    assert [t.item() for t in scaler.scale(iter([one, two]))] == [4, 8]
    # A loss in float16 would be infinite.
    large = scaler.scale(ge.tensor(60000.0, dtype=ge.float16, device="cpu"))
    assert (large.dtype, large.item()) == (ge.float32, 4 * float(np.float16(60000)))
    with pytest.raises(ValueError, match="outputs must be a Tensor or an iterable of Tensors"):
        scaler.scale(3)


def test_a_scaler_that_is_off_does_nothing():
    x = parameter(1.0)
    optimizer = SGD([x], lr=0.5)
    scaler = ge.amp.GradScaler(enabled=False, growth_factor=0.5)
    loss = x.sum()
    assert scaler.scale(loss) is loss
    loss.backward()
    scaler.unscale_(optimizer)
    assert scaler.step(optimizer, lambda: 7) == 7
    scaler.update()
    assert (x.tolist(), scaler.get_scale(), scaler.state_dict()) == ([0.5], 1.0, {})
    assert not scaler.is_enabled()
    scaler.load_state_dict({"scale": 3})
    assert scaler.get_scale() == 1.0


# ---- the order of calls --------------------------------------------------------------------------


def test_wrong_orders_are_refused_in_pytorchs_words():
    x = parameter(1.0)
    optimizer = SGD([x], lr=0.5)
    scaler = ge.amp.GradScaler()
    for name, call in (
        ("unscale_", lambda: scaler.unscale_(optimizer)),
        ("step", lambda: scaler.step(optimizer)),
        ("update", scaler.update),
    ):
        with pytest.raises(RuntimeError, match=f"Attempted {name} but _scale is None"):
            call()
    loss = scaler.scale(x.sum())
    with pytest.raises(RuntimeError, match="No inf checks were recorded for this optimizer"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="No inf checks were recorded prior to update"):
        scaler.update()
    scaler = ge.amp.GradScaler()
    loss = scaler.scale(x.sum())
    loss.backward()
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, lambda: loss)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called since the last"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step\(\)"):
        scaler.unscale_(optimizer)
    scaler.update()
    backward(scaler, x)
    scaler.step(optimizer)


def test_gradients_in_float16_are_refused():
    x = ge.ones(2, dtype=ge.float16, device="cpu", requires_grad=True)
    scaler = ge.amp.GradScaler(init_scale=2)
    scaler.scale(x.sum()).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(SGD([x], lr=1))


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"growth factor must be > 1.0.*growth_factor=1"):
        ge.amp.GradScaler(growth_factor=1)
    with pytest.raises(ValueError, match=r"backoff factor must be < 1.0.*backoff_factor=1"):
        ge.amp.GradScaler(backoff_factor=1)
    with pytest.raises(ValueError, match="a device is named by"):
        ge.amp.GradScaler("tpu")


# ---- the scale by hand, and saved ----------------------------------------------------------------


def test_the_scale_can_be_set():
    x = parameter(1.0)
    scaler = ge.amp.GradScaler("cuda")
    for new in (2.0, ge.tensor([16.0], device="cpu")):
        backward(scaler, x)
        scaler.step(SGD([x], lr=0))
        scaler.update(new)
        assert scaler.get_scale() == float(new)
        assert scaler.scale(ge.tensor(1.0, device="cpu")).item() == float(new)
    scaler.set_growth_factor(3.0)
    scaler.set_backoff_factor(0.25)
    scaler.set_growth_interval(5)
    found = scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()
    assert found == (3.0, 0.25, 5)


def test_a_state_goes_on_elsewhere():
    x = parameter(1.0)
    optimizer = SGD([x], lr=0)
    scaler = ge.amp.GradScaler(init_scale=4, growth_interval=3)
    for _ in range(2):
        backward(scaler, x)
        scaler.step(optimizer)
        scaler.update()
    other = ge.amp.GradScaler()
    backward(other, x)  # so that it has a scale on the device already
    other.load_state_dict(scaler.state_dict())
    for one in (other, pickle.loads(pickle.dumps(scaler))):
        assert one.state_dict() == scaler.state_dict()
        backward(one, x)
        assert x.grad.tolist() == [4]
        one.step(optimizer)
        one.update()
        assert one.get_scale() == 8
    with pytest.raises(RuntimeError, match="The source state dict is empty"):
        other.load_state_dict({})


# ---- on the device -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("where", ["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_arrays_are_unscaled_and_checked(where, name, request):
    dtype = ge.dtypes.as_dtype(name)
    if where == "emulated":
        request.getfixturevalue("emulated_cuda")
    rng = np.random.default_rng(0)
    shapes = [(), (3,), (0, 2), (5, 7), (4099,), *[(2, 2)] * 66]
    given = [np.asarray(rng.standard_normal(shape)).astype(dtype) for shape in shapes]
    given[3] = np.asfortranarray(given[3])
    for place, bad in ((None, 0), (0, np.inf), (4, np.nan), (4, -np.inf), (70, np.nan)):
        arrays = [array.copy(order="K") for array in given]
        if place is not None:
            arrays[place][(-1,) * arrays[place].ndim] = bad
        expected = [(a.astype(np.float64) * 0.25).astype(dtype) for a in arrays]
        grads = [
            ge.devices.to_device(array, "cuda" if where == "cuda" else "cpu") for array in arrays
        ]
        found = kernels.unscale(grads, 0.25)
        assert (found.shape, found.dtype, found.item()) == ((1,), np.float32, place is not None)
        for grad, wanted in zip(grads, expected, strict=True):
            grad = ge.devices.to_device(grad, "cpu").astype(np.float64)
            np.testing.assert_array_equal(grad, wanted.astype(np.float64))


def test_small_gradients_survive_float16(emulated_cuda):
    # The loss's gradient, 1e-6 each, times the inputs of 1e-3 lies below float16's smallest number.
    def gradient(scale: float) -> float:
        weight = ge.full((1, 4), 0.5, requires_grad=True)
        x = ge.full((8, 4), 1e-3)
        scaler = ge.amp.GradScaler(init_scale=scale)
        with ge.autocast("cuda", dtype=ge.float16):
            loss = F.linear(x, weight).sum() * 1e-6
        scaler.scale(loss).backward()
        scaler.unscale_(SGD([weight], lr=0.1))
        return weight.grad[0, 0].item()

    assert gradient(1.0) == 0
    np.testing.assert_allclose(gradient(2.0**16), 8e-9, rtol=2e-3)


def test_a_captured_step_reads_the_scale_as_it_is(gpu):  # noqa: F811
    weight = ge.nn.Parameter(ge.tensor([[1.0, 2.0]]))
    optimizer = SGD([weight], lr=0.5)
    scaler = ge.amp.GradScaler(init_scale=8, growth_interval=1)

    def gradients(x: ge.Tensor) -> None:
        optimizer.zero_grad()
        with ge.autocast("cuda", dtype=ge.float16):
            loss = F.linear(x, weight).sum()
        scaler.scale(loss).backward()

    captured = ge.cuda.graph(gradients, warmup=1)
    for number in range(4):
        captured(ge.ones(1, 2))
        assert weight.grad.tolist() == [[8 * 2**number] * 2]
        scaler.step(optimizer)  # outside: it waits for the GPU
        scaler.update()
        assert weight.tolist() == [[0.5 - 0.5 * number, 1.5 - 0.5 * number]]
    assert gpu[0].captured == 1
