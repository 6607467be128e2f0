"""Rows for products."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.cases import Case, normal

INTEGERS = np.array([[5, -3, 0, 7], [-7, 2, 9, 4]])


def _matmul(note: str, *shapes: tuple[int, ...]) -> Case:
    x, y = (normal(*shape) for shape in shapes)
    return Case(
        "matmul",
        lambda lib, x, y: lib.matmul(x, y),
        (x, y),
        np.matmul,
        differentiable=bool(x.size and y.size),
        note=note,
    )


def _einsum(equation: str, *shapes: tuple[int, ...], reference: Any = None) -> Case:
    return Case(
        "einsum",
        lambda lib, *x: lib.einsum(equation, *x),
        tuple(normal(*shape) for shape in shapes),
        reference or (lambda *x: np.einsum(equation, *x)),
        note=equation,
    )


def _linear(note: str, *shapes: tuple[int, ...]) -> Case:
    def reference(x: Any, weight: Any, bias: Any = 0.0) -> Any:
        return x @ weight.T + bias

    return Case(
        "linear",
        lambda lib, *x: (lib if hasattr(lib, "linear") else lib.nn.functional).linear(*x),
        tuple(normal(*shape) for shape in shapes),
        reference,
        differentiable=shapes[0][0] > 0,
        note=note,
    )


CASES = [
    _matmul("1-D", (4,), (4,)),
    _matmul("1-D by 2-D", (4,), (4, 3)),
    _matmul("2-D by 1-D", (3, 4), (4,)),
    _matmul("2-D", (3, 4), (4, 5)),
    _matmul("1-D by 3-D", (4,), (2, 4, 3)),
    _matmul("3-D by 1-D", (2, 3, 4), (4,)),
    _matmul("3-D by 2-D", (2, 3, 4), (4, 5)),
    _matmul("2-D by 3-D", (3, 4), (2, 4, 5)),
    _matmul("batch", (2, 3, 4), (2, 4, 5)),
    _matmul("broadcast batch", (2, 1, 3, 4), (3, 4, 2)),
    _matmul("batch of 1", (1, 3, 4), (2, 4, 2)),
    _matmul("empty sum", (3, 0), (0, 2)),
    _matmul("empty batch", (0, 3, 4), (4, 2)),
    Case("matmul", lambda lib, x: x @ x, (normal(3, 3),), lambda x: x @ x, note="same twice"),
    Case(
        "matmul",
        lambda lib, x, y: x.T @ y.T,
        (normal(4, 3), normal(5, 4)),
        lambda x, y: x.T @ y.T,
        note="views",
    ),
    Case(
        "matmul",
        lambda lib, x, y: lib.matmul(x, y.T),
        (INTEGERS, INTEGERS),
        lambda x, y: x @ y.T,
        differentiable=False,
        note="integers",
    ),
    Case("mm", lambda lib, x, y: lib.mm(x, y), (normal(3, 4), normal(4, 5)), np.matmul),
    Case("bmm", lambda lib, x, y: lib.bmm(x, y), (normal(2, 3, 4), normal(2, 4, 5)), np.matmul),
    Case("mv", lambda lib, x, y: lib.mv(x, y), (normal(3, 4), normal(4)), np.matmul),
    Case("dot", lambda lib, x, y: lib.dot(x, y), (normal(4), normal(4)), np.dot),
    Case("outer", lambda lib, x, y: lib.outer(x, y), (normal(3), normal(4)), np.outer),
    _linear("2-D", (5, 4), (3, 4), (3,)),
    _linear("no bias", (5, 4), (3, 4)),
    _linear("1-D", (4,), (3, 4), (3,)),
    _linear("3-D", (2, 5, 4), (3, 4), (3,)),
    _linear("3-D, no bias", (2, 5, 4), (3, 4)),
    _linear("empty", (0, 4), (3, 4), (3,)),
    _einsum("ij,jk", (3, 4), (4, 5)),
    _einsum("ij,jk->ki", (3, 4), (4, 5)),
    _einsum("bij,bjk->bik", (2, 3, 4), (2, 4, 5)),
    _einsum("bhqd,bhkd->bhqk", (2, 2, 3, 4), (2, 2, 5, 4)),
    _einsum("i,j", (3,), (4,)),
    _einsum("i,i", (3,), (3,)),
    _einsum("ij->ji", (3, 4)),
    _einsum("ij->", (3, 4)),
    _einsum("ij->j", (3, 4)),
    _einsum("ii", (3, 3)),
    _einsum("ii->i", (3, 3)),
    _einsum("iij->ji", (3, 3, 2)),
    _einsum("iii->i", (3, 3, 3)),
    _einsum("ii,ij->j", (3, 3), (3, 4)),
    _einsum("ij,kl->il", (3, 4), (2, 5)),
    _einsum("ij,ij,ij->i", (3, 4), (3, 4), (3, 4)),
    _einsum("ab,bc,cd", (2, 3), (3, 4), (4, 2)),
    _einsum("ab,cd,bc->da", (2, 3), (4, 2), (3, 4)),
    _einsum("...ij,...jk", (2, 1, 3, 4), (5, 4, 2)),
    _einsum("...,...->...", (3, 4), (4,)),
    _einsum("i...->...", (3, 4, 2)),
    _einsum("...ii->...", (2, 3, 3)),
    _einsum("ij,jk->ik", (3, 1), (4, 5), reference=lambda x, y: x @ np.ones((1, 4)) @ y),
    _einsum("ij,ij->ij", (3, 1), (1, 4), reference=lambda x, y: x * y),
    _einsum("ba->ab", (3, 4)),
    _einsum("bA,Ac", (3, 4), (4, 2)),
]
