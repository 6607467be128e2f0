"""Rows for the reductions."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.special

from tests.cases import Case, distinct, nonzero, normal

X = normal(2, 3, 4)
DISTINCT = distinct(2, 3, 4)
INTEGERS = np.array([[5, -3, 0], [7, 0, 9]])
ZEROS = np.array(
    [[1.5, 0.0, -2.0, 3.0, 0.5], [0.0, 0.0, 2.0, -1.0, 4.0], [1.0, 2.0, 3.0, 4.0, 5.0]]
)


def _everywhere(name: str, reference: Any, x: Any, differentiable: bool = True) -> list[Case]:
    """Return rows that reduce all dims, one, several, and one that is kept."""

    def row(note: str, **options: Any) -> Case:
        numpy_names = {"dim": "axis", "keepdim": "keepdims"}
        return Case(
            name,
            lambda lib, x: getattr(lib, name)(x, **options),
            (x,),
            lambda x: reference(x, **{numpy_names[key]: value for key, value in options.items()}),
            differentiable=differentiable,
            note=note,
        )

    return [
        row(""),
        row("dim", dim=1),
        row("dims", dim=(0, -1)),
        row("keepdim", dim=-2, keepdim=True),
    ]


def _spread(name: str, reference: Any, **options: Any) -> list[Case]:
    dims = {} if "dim" not in options else {"axis": options["dim"]}
    correction = options.get("correction", 1)
    return [
        Case(
            name,
            lambda lib, x: getattr(lib, name)(x, **options),
            (X,),
            lambda x: reference(x, ddof=correction, keepdims=options.get("keepdim", False), **dims),
            note=" ".join(options),
        )
    ]


def _norm(p: Any, **options: Any) -> Case:
    return Case(
        "norm",
        lambda lib, x: lib.norm(x, p, **options),
        (nonzero(2, 3, 4),),
        torch=lambda torch, x: torch.linalg.vector_norm(x, 2 if p == "fro" else p, **options),
        note=" ".join([str(p), *options]),
    )


CASES = [
    *_everywhere("sum", np.sum, X),
    *_everywhere("mean", np.mean, X),
    *_everywhere("amax", np.max, DISTINCT),
    *_everywhere("amin", np.min, DISTINCT),
    *_everywhere("any", np.any, INTEGERS[None] > 0, differentiable=False),
    *_everywhere("all", np.all, INTEGERS[None] > 0, differentiable=False),
    Case("sum", lambda lib, x: lib.sum(x), (INTEGERS.astype(np.int32),), np.sum, False, note="int"),
    Case(
        "sum", lambda lib, x: lib.sum(x, 0), (INTEGERS > 0,), lambda x: x.sum(0), False, note="bool"
    ),
    Case(
        "mean",
        lambda lib, x: lib.mean(x, 0, dtype=lib.float64),
        (INTEGERS,),
        lambda x: x.mean(0),
        False,
        note="dtype",
    ),
    Case("sum", lambda lib, x: lib.sum(x), (normal(),), lambda x: x, note="0-d"),
    *_spread("var", np.var),
    *_spread("var", np.var, dim=(0, 2), keepdim=True),
    *_spread("var", np.var, dim=1, correction=0),
    *_spread("std", np.std),
    *_spread("std", np.std, dim=-1, correction=0),
    Case(
        "var",
        lambda lib, x: lib.var(x, 2, unbiased=False),
        (X,),
        lambda x: x.var(2),
        note="biased",
    ),
    Case("max", lambda lib, x: lib.max(x), (DISTINCT,), np.max),
    Case("min", lambda lib, x: lib.min(x), (DISTINCT,), np.min),
    Case("max", lambda lib, x: lib.max(x, 1).values, (DISTINCT,), lambda x: x.max(1), note="dim"),
    Case(
        "min",
        lambda lib, x: lib.min(x, -1, keepdim=True)[0],
        (DISTINCT,),
        lambda x: x.min(-1, keepdims=True),
        note="keepdim",
    ),
    Case(
        "max",
        lambda lib, x: lib.max(x, 0).indices,
        (DISTINCT,),
        lambda x: x.argmax(0),
        False,
        note="indices",
    ),
    Case("max", lambda lib, x, y: lib.max(x, y), (X, X[:1] * 0 + 0.1), np.maximum, note="of two"),
    Case("min", lambda lib, x, y: lib.min(x, y), (X, X[:1] * 0 + 0.1), np.minimum, note="of two"),
    Case("argmax", lambda lib, x: lib.argmax(x), (DISTINCT,), np.argmax, False),
    Case("argmin", lambda lib, x: lib.argmin(x), (DISTINCT,), np.argmin, False),
    Case(
        "argmax",
        lambda lib, x: lib.argmax(x, 1, keepdim=True),
        (DISTINCT,),
        lambda x: x.argmax(1, keepdims=True),
        False,
        note="keepdim",
    ),
    Case(
        "argmin",
        lambda lib, x: lib.argmin(x, -1),
        (DISTINCT,),
        lambda x: x.argmin(-1),
        False,
        note="dim",
    ),
    Case(
        "count_nonzero", lambda lib, x: lib.count_nonzero(x), (INTEGERS,), np.count_nonzero, False
    ),
    Case(
        "count_nonzero",
        lambda lib, x: lib.count_nonzero(x, 1),
        (INTEGERS,),
        lambda x: np.count_nonzero(x, 1),
        False,
        note="dim",
    ),
    Case("prod", lambda lib, x: lib.prod(x), (ZEROS[2:],), np.prod),
    Case("prod", lambda lib, x: lib.prod(x), (ZEROS[0],), np.prod, note="one zero"),
    Case("prod", lambda lib, x: lib.prod(x, 1), (ZEROS,), lambda x: x.prod(1), note="zeros"),
    Case(
        "prod",
        lambda lib, x: lib.prod(x, 0, keepdim=True),
        (ZEROS,),
        lambda x: x.prod(0, keepdims=True),
        note="three zeros",
    ),
    Case(
        "prod",
        lambda lib, x: lib.prod(x, (0, 2)),
        (X,),
        lambda x: x.prod((0, 2)),
        in_torch=False,
        note="dims",
    ),
    Case(
        "prod", lambda lib, x: lib.prod(x, 0), (INTEGERS,), lambda x: x.prod(0), False, note="int"
    ),
    Case("cumsum", lambda lib, x: lib.cumsum(x, 1), (X,), lambda x: x.cumsum(1)),
    Case(
        "cumsum",
        lambda lib, x: lib.cumsum(x, -1),
        (INTEGERS,),
        lambda x: x.cumsum(-1),
        False,
        note="int",
    ),
    Case(
        "logsumexp",
        lambda lib, x: lib.logsumexp(x, 1),
        (X,),
        lambda x: scipy.special.logsumexp(x, 1),
    ),
    Case(
        "logsumexp",
        lambda lib, x: lib.logsumexp(x, (0, -1), keepdim=True),
        (X + 1000,),
        lambda x: scipy.special.logsumexp(x, (0, 2), keepdims=True),
        note="large",
    ),
    Case(
        "norm",
        lambda lib, x: lib.norm(x),
        (X,),
        lambda x: np.sqrt((x * x).sum()),
    ),
    _norm("fro", dim=(0, 1)),
    _norm(2, dim=1, keepdim=True),
    _norm(1, dim=-1),
    _norm(3, dim=(0, 2)),
    _norm(0.5, dim=1),
    _norm(-1.5, dim=1),
    _norm(float("inf"), dim=1),
    _norm(float("-inf")),
]
