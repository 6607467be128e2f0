"""Rows for indexing."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.cases import Case, normal

X = normal(3, 4, 5)
ROWS = normal(4, 5)
MASK = np.array([True, False, True, True])
PLACES = np.array([2, 0, 2, -1])
PAIRS = np.array([[0, 2, 1], [1, 1, 0]])
GATHERED = np.array([[0, 3, 3, 1], [2, 2, 0, 0]])  # along dim 0 of (4, 5)


def _indexed(note: str, index: Any, reference: Any = None, differentiable: bool = True) -> Case:
    """Return a row for x[index], in which NumPy arrays become the library's tensors."""

    def run(lib: Any, x: Any) -> Any:
        items = index if isinstance(index, tuple) else (index,)
        made = [lib.tensor(item) if isinstance(item, np.ndarray) else item for item in items]
        return x[tuple(made) if isinstance(index, tuple) else made[0]]

    reference = reference or (lambda x: x[index])
    return Case("getitem", run, (X,), reference, differentiable, note=note)


BRACKETS = [
    _indexed("int", 1),
    _indexed("negative int", -1),
    _indexed("slice", slice(1, None)),
    _indexed("steps", (slice(None), slice(None, None, 2), slice(1, 4, 2))),
    _indexed("ints and slices", (0, slice(1, 3), -2)),
    _indexed("all ints", (0, 1, 2)),
    _indexed("Ellipsis", (..., 0)),
    _indexed("None", (slice(None), None, 1, None, ...)),
    _indexed("mask", X > 0),
    _indexed("row mask", (slice(None), MASK)),
    _indexed("no row", (slice(None), MASK & False), differentiable=False),
    _indexed("bool", True),
    _indexed("int tensor", PLACES[:3]),
    _indexed("int8 tensor", np.array([2, 0, 1], dtype=np.int8))._replace(in_torch=False),
    _indexed("2-D tensor", PAIRS),
    _indexed("list", [0, 2, 2]),
    _indexed("0-d tensor", (slice(None), np.array(2)), lambda x: x[:, 2]),
    _indexed("dim 1", (slice(None), PLACES)),
    _indexed("last dim", (..., PAIRS)),
    _indexed("neighbours", (slice(None), PAIRS, np.array([0, 1, -1]))),
    _indexed("apart", (PAIRS, slice(None), np.array([0, 1, -1]))),
    _indexed("mask and tensor", (slice(None), MASK, np.array([4, 0, 0]))),
    _indexed("apart from an int", (0, slice(None), PLACES), lambda x: x[0][:, PLACES]),
    _indexed(
        "with None",
        (None, PLACES[:3], slice(1, 3), None),
        lambda x: x[PLACES[:3], 1:3][None, :, :, None],
    ),
    _indexed("no place", (slice(None), []), lambda x: x[:, :0], differentiable=False),
]


def _written(note: str, index: Any, shape: tuple[int, ...]) -> Case:
    """Return a row for x[index] = value, done to a copy."""

    def run(lib: Any, x: Any, value: Any) -> Any:
        out = x.clone()
        items = index if isinstance(index, tuple) else (index,)
        out[tuple(lib.tensor(i) if isinstance(i, np.ndarray) else i for i in items)] = value
        return out

    def reference(x: Any, value: Any) -> Any:
        x[index] = value
        return x

    return Case("setitem", run, (X, normal(*shape)), reference, note=note)


WRITING = [
    _written("int", 1, (4, 5)),
    _written("broadcast", (slice(None), 2), (5,)),
    _written("0-d", (0, slice(1, 3)), ()),
    _written("more leading dims", (0, 1), (1, 1, 5)),
    _written("stretched", slice(1, 3), (4, 1)),
    _written("mask", (slice(None), MASK), (3, 3, 5)),
    _written("tensor", (slice(None), np.array([3, 0])), (3, 2, 5)),
    _written("apart", (np.array([2, 0]), slice(None), np.array([1, 4])), (2, 4)),
    _written("one element", (0, 1, 2), ()),
]


def _scattered(x: Any, index: Any, src: Any) -> Any:
    for place, chosen in np.ndenumerate(index):
        x[chosen, place[1]] = src[place]
    return x


def _scatter_added(x: Any, index: Any, src: Any) -> Any:
    for place, chosen in np.ndenumerate(index):
        x[place[0], chosen] += src[place]
    return x


GATHERING = [
    Case(
        "gather",
        lambda lib, x, index: lib.gather(x, 0, index),
        (ROWS, GATHERED),
        lambda x, index: x[index, np.arange(4)],
    ),
    Case(
        "gather",
        lambda lib, x, index: lib.gather(x, -1, index),
        (ROWS, GATHERED),
        lambda x, index: x[np.arange(2)[:, None], index],
        note="last dim",
    ),
    Case(
        "take_along_dim",
        lambda lib, x, index: lib.take_along_dim(x, index, dim=0),
        (ROWS, GATHERED[:, :1]),
        lambda x, index: np.take_along_axis(x, index, 0),
        note="broadcast",
    ),
    Case(
        "take_along_dim",
        lambda lib, x, index: lib.take_along_dim(x, index),
        (ROWS, GATHERED),
        lambda x, index: x.ravel()[index.ravel()],
        note="flat",
    ),
    Case("take", lambda lib, x, index: lib.take(x, index), (ROWS, GATHERED), np.take),
    Case(
        "index_select",
        lambda lib, x, index: lib.index_select(x, 1, index),
        (X, np.array([3, 0, 0])),
        lambda x, index: x[:, index],
    ),
    Case(
        "scatter",
        lambda lib, x, index, src: lib.scatter(x, 0, index, src),
        (ROWS, GATHERED, normal(2, 4)),
        _scattered,
    ),
    Case(
        "scatter",
        lambda lib, x, index, src: lib.scatter(x, 0, index, src),
        (ROWS, GATHERED, normal(3, 5)),
        _scattered,
        in_torch=False,  # its backward fails where src is larger than index
        note="larger source",
    ),
    Case(
        "scatter",
        lambda lib, x, index: lib.scatter(x, 1, index, 2.5),
        (ROWS, np.array([[0], [3]])),
        note="number",
    ),
    Case(
        "scatter_add",
        lambda lib, x, index, src: lib.scatter_add(x, 1, index, src),
        (ROWS, GATHERED, normal(2, 4)),
        _scatter_added,
    ),
    Case(
        "scatter_add",
        lambda lib, x, index, src: lib.scatter_add(x, 1, index, src),
        (ROWS, GATHERED, normal(3, 5)),
        _scatter_added,
        in_torch=False,
        note="larger source",
    ),
    Case(
        "index_add",
        lambda lib, x, index, source: lib.index_add(x, 1, index, source),
        (X, np.array([3, 0, 0]), normal(3, 3, 5)),
    ),
    Case(
        "index_add",
        lambda lib, x, index, source: lib.index_add(x, -1, index, source, alpha=-2),
        (X, np.array([1, 1]), normal(3, 4, 2)),
        note="alpha",
    ),
]

MASKS = [
    Case(
        "masked_fill",
        lambda lib, x, mask: lib.masked_fill(x, mask, -2.0),
        (X, MASK[:, None]),
        lambda x, mask: np.where(mask, -2.0, x),
    ),
    Case(
        "masked_fill",
        lambda lib, x, mask, value: lib.masked_fill(x, mask, value),
        (ROWS, X > 0, normal()),
        lambda x, mask, value: np.where(mask, value, x),
        note="tensor",
    ),
    Case(
        "masked_select",
        lambda lib, x, mask: lib.masked_select(x, mask),
        (X, MASK[:, None]),
        lambda x, mask: x[:, MASK].ravel(),
    ),
    Case(
        "nonzero",
        lambda lib, x: lib.nonzero(x),
        (np.array([[0.0, 1.5], [-2.0, 0.0]]),),
        np.argwhere,
        False,
    ),
    Case(
        "nonzero",
        lambda lib, x: lib.nonzero(x, as_tuple=True)[1],
        (np.array([[0.0, 1.5], [-2.0, 0.0]]),),
        lambda x: x.nonzero()[1],
        False,
        note="tuple",
    ),
    Case(
        "one_hot",
        lambda lib, labels: lib.one_hot(labels),
        (PAIRS,),
        lambda labels: np.eye(3, dtype=np.int64)[labels],
        False,
        torch=lambda torch, labels: torch.nn.functional.one_hot(labels),
    ),
    Case(
        "one_hot",
        lambda lib, labels: lib.one_hot(labels, 5),
        (PAIRS,),
        lambda labels: np.eye(5, dtype=np.int64)[labels],
        False,
        torch=lambda torch, labels: torch.nn.functional.one_hot(labels, 5),
        note="classes",
    ),
]

CASES = [*BRACKETS, *WRITING, *GATHERING, *MASKS]
