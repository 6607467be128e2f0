"""Windows of a convolution's source: which rows of window.cuh's tiles are pixels, and what taps read."""

from __future__ import annotations

from typing import NamedTuple

from gradengine.kernels.cuda.tiles import SLAB_BYTES, TensorTile

ROWS_OF_A_COPY = 8  # a window has a multiple


class Axis(NamedTuple):
    """Along one axis: a target position p reads, of taps a, the source positions p + origin + a * step."""

    source: int  # positions
    target: int
    taps: int
    origin: int
    step: int

    @property
    def lowest(self) -> int:
        """The least position that the first target position reads, less 0."""
        return self.origin + min(0, (self.taps - 1) * self.step)

    @property
    def span(self) -> int:
        """From the least to the greatest position that a target position reads."""
        return (self.taps - 1) * abs(self.step)

    @property
    def pitch(self) -> int:
        """Source positions with the gap after them, which serves the next ones as the gap before."""
        after = self.lowest + self.span + self.target - self.source
        return self.source + max(-self.lowest, after, 0)


class Window(NamedTuple):
    """Source pixels with gaps; numbers of rows are as in window.cuh."""

    FIELDS = (
        "rows",
        "top",
        "left",
        "height",
        "width",
        "first_row",
        "step_y",
        "step_x",
        "channel_blocks",
    )

    down: Axis
    across: Axis

    @property
    def is_possible(self) -> bool:
        """Whether there are taps to share a window, and gaps where window.cuh has them."""
        axes = self.down, self.across
        return self.down.taps * self.across.taps > 1 and all(
            axis.lowest <= 0 and 0 < axis.target <= axis.pitch for axis in axes
        )

    @property
    def image(self) -> int:
        """Rows from one image to the next."""
        return self.down.pitch * self.across.pitch

    def rows(self, tile: TensorTile) -> int:
        rows = tile.rows + self.down.span * self.across.pitch + self.across.span
        return -(-rows // ROWS_OF_A_COPY) * ROWS_OF_A_COPY

    def shared_bytes(self, tile: TensorTile) -> int:
        """Return the size of the ring of weights, the window, and the table of rows."""
        rows = self.rows(tile)
        ring = tile.stages * tile.columns * SLAB_BYTES
        return ring + rows * SLAB_BYTES + (tile.rows + rows) * 4

    def fields(self, tile: TensorTile, channel_blocks: int) -> dict[str, int]:
        """Return the struct Window of window.cuh."""
        down, across = self
        first = (down.origin - down.lowest) * across.pitch + across.origin - across.lowest
        return {
            "rows": self.rows(tile),
            "top": -down.lowest,
            "left": -across.lowest,
            "height": down.target,
            "width": across.target,
            "first_row": first,
            "step_y": down.step * across.pitch,
            "step_x": across.step,
            "channel_blocks": channel_blocks,
        }
