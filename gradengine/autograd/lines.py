"""At which line of the user's source each operation was recorded: noted while asked for, else free."""

from __future__ import annotations

from typing import Any

from gradengine import source_lines
from gradengine.tape import Node


class trace_lines:  # noqa: N801 (a mode, as no_grad is)
    """Note the line of every operation recorded inside a `with` block, in any thread; blocks nest.

    An error about a saved value that was changed then names the line that saved it beside the one that
    changed it. Outside such blocks nothing is noted, and recording an operation costs nothing more.
    """

    _blocks = 0
    _plain: Any = Node.__init__

    def __enter__(self) -> trace_lines:
        trace_lines._blocks += 1
        Node.__init__ = _noted_init  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        trace_lines._blocks -= 1
        if not trace_lines._blocks:
            Node.__init__ = trace_lines._plain  # type: ignore[method-assign]


def _noted_init(node: Node, *arguments: Any) -> None:
    trace_lines._plain(node, *arguments)
    place = source_lines.calling_place()
    if place is not None:
        source_lines.places_of_nodes[node] = place
