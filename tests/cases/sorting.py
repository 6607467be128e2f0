"""Rows for sorting."""

from __future__ import annotations

import numpy as np

from tests.cases import Case, distinct

X = distinct(3, 7)

CASES = [
    Case("sort", lambda lib, x: lib.sort(x).values, (X,), np.sort),
    Case(
        "sort",
        lambda lib, x: lib.sort(x, 0, descending=True).values,
        (X,),
        lambda x: -np.sort(-x, 0),
        note="descending",
    ),
    Case(
        "sort",
        lambda lib, x: lib.sort(x, dim=0)[1],
        (X,),
        lambda x: x.argsort(0),
        False,
        note="indices",
    ),
    Case("argsort", lambda lib, x: lib.argsort(x), (X,), np.argsort, False),
    Case(
        "argsort",
        lambda lib, x: lib.argsort(x, 0, True),
        (X,),
        lambda x: np.argsort(-x, 0),
        False,
        note="descending",
    ),
    Case(
        "topk",
        lambda lib, x: lib.topk(x, 3).values,
        (X,),
        lambda x: -np.sort(-x)[:, :3],
    ),
    Case(
        "topk",
        lambda lib, x: lib.topk(x, 1, dim=0, largest=False).values,
        (X,),
        lambda x: np.sort(x, 0)[:1],
        note="smallest",
    ),
    Case(
        "topk",
        lambda lib, x: lib.topk(x, 2, largest=False).indices,
        (X,),
        lambda x: np.argsort(x)[:, :2],
        False,
        note="indices",
    ),
    Case(
        "topk",
        lambda lib, x: lib.topk(x, 7).values,
        (X,),
        lambda x: -np.sort(-x),
        note="all",
    ),
]
