"""Every kernel once more, as plain loops in float64, by its definition alone."""

import math

import numpy as np


def conv2d(x, weight, bias, stride=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1), groups=1):
    """Cross-correlation; padding is ((top, bottom), (left, right))."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    padded = np.pad(x, ((0, 0), (0, 0), *padding))
    batch = x.shape[0]
    out_channels, channels, kernel_height, kernel_width = weight.shape
    out_height = len(range(0, padded.shape[2] - dilation[0] * (kernel_height - 1), stride[0]))
    out_width = len(range(0, padded.shape[3] - dilation[1] * (kernel_width - 1), stride[1]))
    out = np.zeros((batch, out_channels, out_height, out_width))
    for k in range(out_channels):
        first = k // (out_channels // groups) * channels
        for p in range(out_height):
            for q in range(out_width):
                for r in range(kernel_height):
                    for s in range(kernel_width):
                        h, w = p * stride[0] + r * dilation[0], q * stride[1] + s * dilation[1]
                        pixels = padded[:, first : first + channels, h, w]
                        out[:, k, p, q] += pixels @ weight[k, :, r, s]
    return out if bias is None else out + np.asarray(bias, np.float64)[:, None, None]


def conv2d_gradients(grad, x, weight, stride, padding, dilation, groups):
    """Give (by x, by weight): the product rule on each multiplication of conv2d."""
    grad, x, weight = (np.asarray(array, np.float64) for array in (grad, x, weight))
    (top, _), (left, _) = padding
    padded = np.pad(x, ((0, 0), (0, 0), *padding))
    by_padded, by_weight = np.zeros_like(padded), np.zeros_like(weight)
    out_channels, channels, kernel_height, kernel_width = weight.shape
    for k in range(out_channels):
        first = k // (out_channels // groups) * channels
        part = slice(first, first + channels)
        for p in range(grad.shape[2]):
            for q in range(grad.shape[3]):
                for r in range(kernel_height):
                    for s in range(kernel_width):
                        h, w = p * stride[0] + r * dilation[0], q * stride[1] + s * dilation[1]
                        by_padded[:, part, h, w] += grad[:, k, p, q, None] * weight[k, :, r, s]
                        by_weight[k, :, r, s] += grad[:, k, p, q] @ padded[:, part, h, w]
    return by_padded[:, :, top : top + x.shape[2], left : left + x.shape[3]], by_weight


def windows(size, kernel, stride, padding, dilation=1, ceil_mode=False):
    """Give each window of one axis as its list of positions, those on padding included."""
    found, start = [], -padding
    while True:
        taps = [start + tap * dilation for tap in range(kernel)]
        fits = taps[-1] < size + padding
        # the rule of ceil_mode: a window may stick out, if it starts inside or on padding before
        sticks_out = ceil_mode and taps[-1] - (size + padding - 1) < stride and start < size
        if not fits and not sticks_out:
            return found
        found.append(taps)
        start += stride


def max_pool2d(x, rows, columns):
    """Give (maxima, flat positions) for the windows of both axes."""
    batch, channels, height, width = x.shape
    shape = (batch, channels, len(rows), len(columns))
    out, indices = np.zeros(shape), np.zeros(shape, np.int64)
    for n, c, p, q in np.ndindex(*shape):
        best = None
        for h in rows[p]:
            for w in columns[q]:
                if not (0 <= h < height and 0 <= w < width):
                    continue
                value = float(x[n, c, h, w])
                if best is None or value > best or math.isnan(value):
                    best = value
                    out[n, c, p, q], indices[n, c, p, q] = value, h * width + w
    return out, indices


def max_pool2d_scatter(grad, indices, input_shape):
    out = np.zeros(input_shape)
    for n, c, p, q in np.ndindex(*grad.shape):
        h, w = divmod(int(indices[n, c, p, q]), input_shape[3])
        out[n, c, h, w] += grad[n, c, p, q]
    return out


def max_pool2d_gather(x, indices):
    out = np.zeros(indices.shape)
    for n, c, p, q in np.ndindex(*indices.shape):
        h, w = divmod(int(indices[n, c, p, q]), x.shape[3])
        out[n, c, p, q] = x[n, c, h, w]
    return out


def avg_pool_divisor(rows, columns, size, padding, count_include_pad, divisor_override):
    """Give the divisor of one window from its row and column positions."""
    if divisor_override is not None:
        return divisor_override
    margins = padding if count_include_pad else (0, 0)
    counts = [
        sum(-margin <= position < extent + margin for position in positions)
        for positions, extent, margin in zip((rows, columns), size, margins, strict=True)
    ]
    return counts[0] * counts[1]


def avg_pool2d(x, rows, columns, padding, count_include_pad=True, divisor_override=None):
    batch, channels, height, width = x.shape
    out = np.zeros((batch, channels, len(rows), len(columns)))
    for n, c, p, q in np.ndindex(*out.shape):
        inside = [(h, w) for h in rows[p] for w in columns[q] if 0 <= h < height and 0 <= w < width]
        divisor = avg_pool_divisor(
            rows[p], columns[q], (height, width), padding, count_include_pad, divisor_override
        )
        out[n, c, p, q] = sum(float(x[n, c, h, w]) for h, w in inside) / divisor
    return out


def batch_norm(x, weight, bias, eps):
    x = np.asarray(x, np.float64)
    channels = x.shape[1]
    mean = np.array([math.fsum(x[:, c].ravel()) / x[:, c].size for c in range(channels)])
    squares = [(x[:, c] - mean[c]).ravel() ** 2 for c in range(channels)]
    variance = np.array([math.fsum(square) / square.size for square in squares])
    weight = np.ones(channels) if weight is None else np.asarray(weight, np.float64)
    bias = np.zeros(channels) if bias is None else np.asarray(bias, np.float64)
    out = np.zeros_like(x)
    for c in range(channels):
        out[:, c] = (x[:, c] - mean[c]) / math.sqrt(variance[c] + eps) * weight[c] + bias[c]
    return out, mean, variance


def erf(x):
    return np.array([math.erf(value) for value in x.ravel()]).reshape(x.shape)
