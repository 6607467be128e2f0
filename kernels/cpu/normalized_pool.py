"""Batch normalization, ReLU and a max pool, one after the other: each is a pass of its own here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradengine.kernels.cpu.activation import relu_grad
from gradengine.kernels.cpu.normalization import batch_norm_act, batch_norm_act_grad
from gradengine.kernels.cpu.pooling import max_pool2d, max_pool2d_scatter
from gradengine.kernels.layout import Array

if TYPE_CHECKING:
    from gradengine.kernels.geometry import Pool2dGeometry


def batch_norm_relu_max_pool(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    geometry: Pool2dGeometry,
    moments: tuple[Array, Array] | None,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: float,
    batches: Array | None = None,
) -> tuple[Array, Array, Array, Array, None]:
    normalized, mean, inv_std, _ = batch_norm_act(
        *(x, weight, bias, None, True, eps, moments, running_mean, running_var, momentum, batches)
    )
    out, indices = max_pool2d(normalized, geometry)
    return out, mean, inv_std, indices, None


def batch_norm_relu_max_pool_grad(
    grad: Array,
    x: Array,
    out: Array,
    winners: Array,
    peaks: None,
    weight: Array | None,
    bias: Array | None,
    mean: Array,
    inv_std: Array,
    geometry: Pool2dGeometry,
) -> tuple[Array, Array, Array]:
    # Where the largest pixel of a window is 0, relu lets nothing through.
    by_normalized = max_pool2d_scatter(relu_grad(grad, out), winners, geometry)
    arguments = (None, None, weight, mean, inv_std, False, False)
    return batch_norm_act_grad(by_normalized, x, *arguments)[:3]


def winning_positions(winners: Array, geometry: Pool2dGeometry) -> Array:
    return winners
