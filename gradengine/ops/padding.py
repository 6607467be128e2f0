"""Padding: borders of a constant, of reflected, repeated or wrapped elements."""

from __future__ import annotations

from typing import Any

from gradengine.devices import array_module
from gradengine.operation import broadcast_to, operation
from gradengine.ops.joining import cat, narrow
from gradengine.ops.shape import flip

# ---- padding -------------------------------------------------------------------------------------


@operation(label="ConstantPadNdBackward0")
def _pad(x, *, widths, value):
    """Add (before, after) places to each dim, or take them away where a width is negative."""
    shape = tuple(
        size + before + after for size, (before, after) in zip(x.shape, widths, strict=True)
    )
    out = array_module(x).full_like(x, value, shape=shape)
    kept = tuple(
        slice(max(0, before), max(0, before) + size + min(0, before) + min(0, after))
        for size, (before, after) in zip(x.shape, widths, strict=True)
    )
    source = tuple(
        slice(max(0, -before), size + min(0, after))
        for size, (before, after) in zip(x.shape, widths, strict=True)
    )
    out[kept] = x[source]
    return out


_pad.pullbacks(
    x=lambda grad, widths: _pad(
        grad, widths=tuple((-before, -after) for before, after in widths), value=0
    )
)


def pad(x: Any, pad: Any, mode: str = "constant", value: float = 0.0) -> Any:
    """Return x with places added at both ends of its last dims, or taken away by negative widths.

    `pad` holds (before, after) for the last dim, then for the one before it, and so on. `mode` is
    "constant" (filled with `value`), "reflect" (mirrored without the edge), "replicate" (the edge
    repeated) or "circular". Raises ValueError for widths that x cannot give.
    """
    widths = _pad_widths(tuple(x.shape), tuple(pad))
    if mode == "constant":
        return _pad(x, widths=widths, value=value)
    edges = _EDGES.get(mode)
    if edges is None:
        raise ValueError(
            f'pad: mode must be "constant", "reflect", "replicate" or "circular"; got mode={mode!r}'
        )
    cropped = tuple((min(0, before), min(0, after)) for before, after in widths)
    if any(map(any, cropped)):
        x = _pad(x, widths=cropped, value=0)
    added = [(max(0, before), max(0, after)) for before, after in widths]
    for dim, (before, after) in enumerate(added):
        if before or after:
            _check_edges(mode, x.shape, dim, max(before, after))
            first, last = edges(x, dim, before, after)
            x = cat([first, x, last], dim=dim)
    return x


def _pad_widths(shape: tuple[int, ...], pad: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    if len(pad) % 2 or len(pad) > 2 * len(shape):
        raise ValueError(
            "pad: pad must hold two widths for each padded dim (len(pad) even, <= 2 * ndim); "
            f"got pad={pad}, ndim={len(shape)}"
        )
    pairs = list(zip(pad[::2], pad[1::2], strict=True))[::-1]
    widths = ((0, 0),) * (len(shape) - len(pairs)) + tuple(pairs)
    if any(size + before + after < 0 for size, (before, after) in zip(shape, widths, strict=True)):
        raise ValueError(f"pad: no size may become negative; got pad={pad}, x.shape={shape}")
    return widths


def _check_edges(mode: str, shape: tuple[int, ...], dim: int, width: int) -> None:
    largest = {"reflect": shape[dim] - 1, "circular": shape[dim]}.get(mode, width)
    if shape[dim] == 0 or width > largest:
        raise ValueError(
            f"pad: mode {mode!r} can add at most {max(0, largest)} places to dim {dim}; "
            f"got width={width}, x.shape={tuple(shape)}"
        )


def _reflected_edges(x: Any, dim: int, before: int, after: int) -> tuple[Any, Any]:
    first = narrow(x, dim, 1, before)
    last = narrow(x, dim, x.shape[dim] - 1 - after, after)
    return flip(first, (dim,)), flip(last, (dim,))


def _replicated_edges(x: Any, dim: int, before: int, after: int) -> tuple[Any, Any]:
    head, tail = x.shape[:dim], x.shape[dim + 1 :]
    first, last = narrow(x, dim, 0, 1), narrow(x, dim, x.shape[dim] - 1, 1)
    return (
        broadcast_to(first, shape=(*head, before, *tail)),
        broadcast_to(last, shape=(*head, after, *tail)),
    )


def _circular_edges(x: Any, dim: int, before: int, after: int) -> tuple[Any, Any]:
    return narrow(x, dim, x.shape[dim] - before, before), narrow(x, dim, 0, after)


_EDGES = {
    "reflect": _reflected_edges,
    "replicate": _replicated_edges,
    "circular": _circular_edges,
}
