"""A trace's forward operations as a drawing: SVG of our own, or DOT for Graphviz, modules as boxes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from gradengine.autograd.trace import Operation, Value

ROW, INDENT, MARGIN = 22, 14, 10  # pixels
LETTER = 6.7  # pixels that a letter of the font takes on average


class Row(NamedTuple):
    """One line of the drawing: an operation, or the title of a module's box."""

    depth: int
    title: str
    operation: int | None
    end: int  # of a box: the row below its last one


def _rows(operations: Sequence[Operation]) -> list[Row]:
    """Return all lines from top to bottom: operations in their order, boxes around those of one module."""
    rows: list[Row] = []
    boxes: list[tuple[str, int]] = []  # open ones: name and row
    for index, each in enumerate(operations):
        if each.phase != "forward":
            continue
        path = each.module.split(".") if each.module else []
        shared = 0
        while shared < min(len(path), len(boxes)) and path[shared] == boxes[shared][0]:
            shared += 1
        _close(rows, boxes, shared)
        for name in path[shared:]:
            boxes.append((name, len(rows)))
            rows.append(Row(len(boxes) - 1, name, None, 0))
        rows.append(Row(len(boxes), "", index, 0))
    _close(rows, boxes, 0)
    return rows


def _close(rows: list[Row], boxes: list[tuple[str, int]], keep: int) -> None:
    while len(boxes) > keep:
        _, top = boxes.pop()
        rows[top] = rows[top]._replace(end=len(rows))


def _label(each: Operation) -> str:
    results = ", ".join(map(_form, each.outputs))
    return f"{each.name} → {results}   {each.line}   {each.seconds * 1e3:.2f} ms"


def _form(value: Value) -> str:
    return f"{value.dtype}{list(value.shape)}"


def svg(operations: Sequence[Operation]) -> str:
    """Return an SVG: one line an operation, an arc on the right from what made each of its inputs."""
    rows = _rows(operations)
    texts = [
        row.title if row.operation is None else _label(operations[row.operation]) for row in rows
    ]
    deepest = max((row.depth for row in rows), default=0)
    edge = 2 * MARGIN + 2 * INDENT * (deepest + 1) + LETTER * max(map(len, texts), default=0)
    place = {row.operation: number for number, row in enumerate(rows) if row.operation is not None}
    arcs, reach = _arcs(operations, place, edge)
    shapes = [_box(row, number, edge) for number, row in enumerate(rows) if row.operation is None]
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        style = ' font-weight="bold"' if row.operation is None else ""
        x, y = MARGIN + INDENT * (row.depth + 0.5), MARGIN + ROW * (number + 0.7)
        shapes.append(f'<text x="{x:g}" y="{y:g}"{style}>{escape(text)}</text>')
    size = f'width="{edge + reach + MARGIN:g}" height="{2 * MARGIN + ROW * len(rows):g}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n'
        '<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(shapes + arcs)
        + "\n</svg>\n"
    )


def _box(row: Row, number: int, edge: float) -> str:
    x = MARGIN + INDENT * row.depth
    y, height = MARGIN + ROW * number + 2, ROW * (row.end - number) - 4
    width = edge - MARGIN - INDENT * row.depth - x
    shade = max(84, 97 - 3 * row.depth)
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" '
        f'fill="hsl(212, 60%, {shade}%)" stroke="#8aa4c0"/>'
    )


def _arcs(
    operations: Sequence[Operation], place: dict[int, int], edge: float
) -> tuple[list[str], float]:
    """Return the arcs, and how far they reach to the right."""
    arcs = []
    reach = 0.0
    for index, number in place.items():
        for value in operations[index].inputs:
            if value.source is None or value.source not in place:
                continue
            top, bottom = (MARGIN + ROW * (n + 0.5) for n in (place[value.source], number))
            bulge = 8 + 3 * (number - place[value.source])
            reach = max(reach, 0.75 * bulge)  # of a cubic curve whose handles are that long
            curve = f"M {edge:g} {top:g} C {edge + bulge:g} {top:g} {edge + bulge:g} {bottom:g} "
            arcs.append(f'<path d="{curve}{edge:g} {bottom:g}" fill="none" stroke="#567"/>')
    return arcs, reach


def dot(operations: Sequence[Operation]) -> str:
    """Return a graph in Graphviz's language: modules are clusters, edges bear shapes."""
    lines = ["digraph trace {", '  node [shape=box, fontname="sans-serif"];']
    depth = 0
    rows = _rows(operations)
    ends: list[int] = []
    for number, row in enumerate(rows):
        while ends and ends[-1] == number:
            ends.pop()
            depth -= 1
            lines.append("  " * (depth + 1) + "}")
        indent = "  " * (depth + 1)
        if row.operation is None:
            lines.append(f'{indent}subgraph cluster_{number} {{ label="{_quoted(row.title)}";')
            ends.append(row.end)
            depth += 1
        else:
            each = operations[row.operation]
            text = f"{_quoted(each.name)}\\n{_quoted(each.line)}"
            lines.append(f'{indent}n{row.operation} [label="{text}"];')
    lines += ["  " * (level + 1) + "}" for level in reversed(range(depth))]
    for index, each in enumerate(operations):
        if each.phase == "forward":
            lines += [
                f'  n{value.source} -> n{index} [label="{_form(value)}"];'
                for value in each.inputs
                if value.source is not None
            ]
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
