"""Tiles that are timed: each is tried once for a shape, and the fastest serves from then on."""

import time

import numpy as np
import pytest

from gradengine import kernels
from gradengine.kernels import settings
from gradengine.kernels.cuda import capture, conv2d, launch, tuning
from gradengine.kernels.geometry import conv2d_geometry


@pytest.fixture
def clock(emulated_cuda, monkeypatch):
    """Let times be told by the test: {tile: seconds}; give them and the list of tiles timed."""
    seconds, timed = {}, []
    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setattr(
        tuning, "_seconds", lambda run, tile: (run(tile), timed.append(tile), seconds[tile])[2]
    )
    return seconds, timed


def tiles_loaded():
    return {name for _, source, name in launch._kernels if source == conv2d.SOURCE}


def names_of(tile):
    return {
        conv2d._forward_name("float", tile, "true"),
        conv2d._gradient_name("float", tile),
    }


def convolve(rng):
    x = rng.standard_normal((2, 8, 9, 7)).astype(np.float32)
    weight = rng.standard_normal((12, 8, 3, 3)).astype(np.float32)
    geometry = conv2d_geometry(x.shape, weight.shape, 1, 1)
    out, mean, _ = kernels.conv2d_moments(x, weight, None, geometry)
    return out, mean, kernels.conv2d_grad_input(out, weight, geometry)


def test_nothing_is_timed_unless_asked_for(clock, rng):
    convolve(rng)
    assert clock[1] == []


def test_the_fastest_tile_serves_and_is_looked_for_once(clock, rng, monkeypatch):
    expected = convolve(rng)
    seconds, timed = clock
    tiles = [*conv2d.TILES, *conv2d.WINDOW_TILES]
    seconds |= {tile: float(number) for number, tile in enumerate(reversed(tiles))}
    monkeypatch.setattr(settings.cuda, "benchmark", True)
    found = convolve(np.random.default_rng(20240521))
    assert timed == [*tiles, *tiles]  # forward and gradient
    launch.forget_kernels()
    convolve(rng)
    assert len(timed) == 2 * len(tiles)
    assert tiles_loaded() >= names_of(tiles[-1])
    assert not tiles_loaded() & names_of(tiles[0])
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_step_that_is_captured_takes_what_is_known(clock, rng, monkeypatch):
    monkeypatch.setattr(settings.cuda, "benchmark", True)
    monkeypatch.setattr(capture, "current", object)
    convolve(rng)
    assert clock[1] == []


def test_the_device_is_held_for_a_while(emulated_cuda):
    launch.kernel("tuning.cu", "hold")((1,), (32,), (1000,))
    assert emulated_cuda.statistics()["blocks"] == 1


@pytest.mark.gpu
def test_the_time_of_the_host_does_not_count():
    launch.runtime.seconds(lambda: None)  # compiles
    assert min(launch.runtime.seconds(lambda: time.sleep(1e-4)) for _ in range(5)) < 5e-5


def test_the_emulator_tells_time(emulated_cuda):
    assert emulated_cuda.seconds(lambda: sum(range(10_000))) > 0
