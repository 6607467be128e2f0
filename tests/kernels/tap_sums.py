"""Convolution in float64 as one matrix product for each tap: for shapes too large for plain loops."""

import numpy as np


def convolution_passes(x, weight, grad, geometry):
    """Give the result, and the gradients by x and by weight, for `grad` of the result."""
    x, weight, grad = (np.asarray(array, np.float64) for array in (x, weight, grad))
    (top, _), (left, _) = geometry.padding
    padded = np.pad(x, ((0, 0), (0, 0), *geometry.padding))
    out, by_padded = np.zeros(geometry.output_shape), np.zeros_like(padded)
    by_weight = np.zeros_like(weight)
    own_in = geometry.in_channels // geometry.groups
    own_out = geometry.out_channels // geometry.groups
    for group in range(geometry.groups):
        inputs = slice(group * own_in, (group + 1) * own_in)
        outputs = slice(group * own_out, (group + 1) * own_out)
        above = _flat(grad[:, outputs])
        for r, s in np.ndindex(geometry.kernel_height, geometry.kernel_width):
            at = (slice(None), inputs, *_pixels(geometry, r, s))
            tap, pixels = weight[outputs, :, r, s], _flat(padded[at])
            shape = (geometry.batch, -1, geometry.out_height, geometry.out_width)
            out[:, outputs] += (tap @ pixels).reshape(shape)
            by_padded[at] += (tap.T @ above).reshape(shape)
            by_weight[outputs, :, r, s] = (above @ pixels.transpose(0, 2, 1)).sum(axis=0)
    height, width = x.shape[2:]
    return out, by_padded[:, :, top : top + height, left : left + width], by_weight


def _flat(pixels):
    return pixels.reshape(*pixels.shape[:2], -1)


def _pixels(geometry, *tap):
    """Give the rows and columns of the padded input that a tap reads."""
    sizes = (geometry.out_height, geometry.out_width)
    for number, size, step, spread in zip(
        tap, sizes, geometry.stride, geometry.dilation, strict=True
    ):
        yield slice(number * spread, number * spread + (size - 1) * step + 1, step)
