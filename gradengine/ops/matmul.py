"""Products: matrix products of every rank, sums of products, and the linear layer's map."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gradengine import kernels
from gradengine.autocast_mode import autocast_mode
from gradengine.devices import array_module
from gradengine.dtypes import narrowed, widened
from gradengine.kernels import settings
from gradengine.operation import array_of, operation, sum_to_shape
from gradengine.ops.shape import reshape
from gradengine.precision import lowered, widest

# ---- matrix products -----------------------------------------------------------------------------


@operation(label="DotBackward0")
def _dot(x, y):
    return _times_vector(x, y)


@operation(label="MvBackward0")
def _mv(x, y):
    return _times_vector(x, y)


def _times_vector(x: Any, y: Any) -> Any:
    """Return the sums of x's rows, x (K,) or (M, K), times y (K,)."""
    if settings.general.deterministic:
        rows = x.reshape(1, x.shape[0]) if x.ndim == 1 else x
        return kernels.matmul(rows, y.reshape(y.shape[0], 1)).reshape(x.shape[:-1])
    return narrowed(x @ y, x.dtype)  # NumPy's products of bfloat16 are float32


@operation(label="MmBackward0")
def _mm(x, y):
    return kernels.matmul(x, y)


@operation(label="BmmBackward0")
def _bmm(x, y):
    return kernels.matmul(x, y)


_dot.pullbacks(x=lambda grad, y: grad * y, y=lambda grad, x: grad * x)
_mv.pullbacks(
    x=lambda grad, y: reshape(grad, (grad.shape[0], 1)) * y, y=lambda grad, x: x.mT @ grad
)
_mm.pullbacks(x=lambda grad, y: _mm(grad, y.mT), y=lambda grad, x: _mm(x.mT, grad))
_bmm.pullbacks(
    x=lambda grad, y, x_shape: _unbroadcast(_bmm(grad, y.mT), x_shape),
    y=lambda grad, x, y_shape: _unbroadcast(_bmm(x.mT, grad), y_shape),
)


def _unbroadcast(grad: Any, shape: tuple[int, ...]) -> Any:
    return grad if grad.shape == shape else sum_to_shape(grad, shape=shape)


def matmul(x: Any, y: Any) -> Any:
    """Return the matrix product of x (..., M, K) and y (..., K, N), shape (..., M, N).

    Leading axes broadcast. A 1-D x is a row and a 1-D y a column; the result lacks that axis.
    Raises ValueError if the shapes do not fit, TypeError if the dtypes differ.
    """
    if autocast_mode.dtype is not None:
        x, y = lowered(x), lowered(y)
    _check_product("matmul", array_of(x), array_of(y))
    if y.ndim == 1:
        if x.ndim <= 2:
            return _dot(x, y) if x.ndim == 1 else _mv(x, y)
        return reshape(_mv(_rows(x), y), x.shape[:-1])
    if x.ndim == 1:
        product = matmul(reshape(x, (1, x.shape[0])), y)
        return reshape(product, (*y.shape[:-2], y.shape[-1]))
    if y.ndim == 2:  # one product of many rows: cheaper than a batch, above all its gradient by y
        product = _mm(_rows(x), y)
        return product if x.ndim == 2 else reshape(product, (*x.shape[:-1], y.shape[-1]))
    return _bmm(x, y)


def _rows(x: Any) -> Any:
    """Return x (..., K) as one matrix (rows, K)."""
    return x if x.ndim == 2 else reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))


def mm(x: Any, y: Any) -> Any:
    """Return the matrix product of x (M, K) and y (K, N). Raises ValueError for other ranks."""
    _check_ranks("mm", x, y, 2, 2)
    return matmul(x, y)


def bmm(x: Any, y: Any) -> Any:
    """Return the products of x (B, M, K) and y (B, K, N), as `matmul`, without broadcasting.

    Raises ValueError for other ranks or unequal batches.
    """
    _check_ranks("bmm", x, y, 3, 3)
    if x.shape[0] != y.shape[0]:
        _refuse("bmm: x and y must agree on the batch (x.shape[0] == y.shape[0])", x, y)
    return matmul(x, y)


def mv(x: Any, y: Any) -> Any:
    """Return the product of a matrix and a vector. Raises ValueError for other ranks."""
    _check_ranks("mv", x, y, 2, 1)
    return matmul(x, y)


def dot(x: Any, y: Any) -> Any:
    """Return the 0-d inner product of two vectors (K,). Raises ValueError for other ranks."""
    _check_ranks("dot", x, y, 1, 1)
    if autocast_mode.dtype is not None:
        x, y = widest(x, y)
    _check_product("dot", x, y)
    return _dot(x, y)


def outer(x: Any, y: Any) -> Any:
    """Return all products x[i] * y[j] of two vectors. Raises ValueError for other ranks."""
    _check_ranks("outer", x, y, 1, 1)
    return reshape(x, (x.shape[0], 1)) * y


def _check_product(name: str, x: Any, y: Any) -> None:
    if x.dtype != y.dtype:
        raise TypeError(
            f"{name}: x and y must have one dtype (x.dtype == y.dtype); "
            f"got x.dtype={x.dtype}, y.dtype={y.dtype}"
        )
    if x.ndim == 0 or y.ndim == 0:
        _refuse(
            f"{name}: x and y must have an axis to sum over (x.ndim >= 1 and y.ndim >= 1)", x, y
        )
    if x.shape[-1] != y.shape[-2 if y.ndim > 1 else -1]:
        rule = "x.shape[-1] == y.shape[-2]" if y.ndim > 1 else "x.shape[-1] == y.shape[0]"
        _refuse(f"{name}: x and y must agree on the summed size ({rule})", x, y)
    if x.ndim > 2 and y.ndim > 2:
        try:
            np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        except ValueError:
            _refuse(f"{name}: leading axes must broadcast (x.shape[:-2] with y.shape[:-2])", x, y)


def _check_ranks(name: str, x: Any, y: Any, x_rank: int, y_rank: int) -> None:
    if x.ndim != x_rank or y.ndim != y_rank:
        rule = f"x must be {x_rank}-D and y {y_rank}-D (x.ndim == {x_rank} and y.ndim == {y_rank})"
        _refuse(f"{name}: {rule}", x, y)


def _refuse(rule: str, x: Any, y: Any) -> None:
    raise ValueError(f"{rule}; got x.shape={tuple(x.shape)}, y.shape={tuple(y.shape)}")


# ---- the linear map ------------------------------------------------------------------------------


@operation(label="AddmmBackward0")
def _linear(x, weight, bias):
    out = _linear_without_bias.operation.forward(x, weight)
    out += bias
    return out


@operation(label="MmBackward0")
def _linear_without_bias(x, weight):
    product = kernels.matmul(_rows(x), weight.T)
    return product if x.ndim == 2 else product.reshape(*x.shape[:-1], weight.shape[0])


def _linear_grad_input(grad: Any, weight: Any) -> Any:
    return matmul(grad, weight)


def _linear_grad_weight(grad: Any, x: Any) -> Any:
    return _mm(_rows(grad).mT, _rows(x))


_linear.pullbacks(
    x=_linear_grad_input,
    weight=_linear_grad_weight,
    bias=lambda grad, bias_shape: sum_to_shape(grad, shape=bias_shape),
)
_linear_without_bias.pullbacks(x=_linear_grad_input, weight=_linear_grad_weight)


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Return x @ weight.T + bias (..., N), for x (..., K), weight (N, K) and bias (N,) or None.

    Raises ValueError if the shapes do not fit, TypeError if the dtypes differ.
    """
    if autocast_mode.dtype is not None:
        x, weight, bias = lowered(x), lowered(weight), lowered(bias)
    arrays = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    if any(array.dtype != x.dtype for array in arrays.values()):
        got = ", ".join(f"{name}.dtype={array.dtype}" for name, array in arrays.items())
        raise TypeError(
            f"linear: all inputs must have one dtype (x.dtype == weight.dtype); got {got}"
        )
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    if len(shapes["weight"]) != 2 or shapes["x"][-1:] != shapes["weight"][1:]:
        rule = "x and a 2-D weight must agree on input features (x.shape[-1] == weight.shape[1])"
    elif shapes.get("bias") not in (None, shapes["weight"][:1]):
        rule = "bias must have one element for each output feature (bias.shape == weight.shape[:1])"
    else:
        return _linear_without_bias(x, weight) if bias is None else _linear(x, weight, bias)
    got = ", ".join(f"{name}.shape={shape}" for name, shape in shapes.items())
    raise ValueError(f"linear: {rule}; got {got}")


# ---- einsum --------------------------------------------------------------------------------------
# An equation becomes one _rearrange of each operand that needs it (diagonals, and sums over letters
# that stand nowhere else) and one _contract for each further operand. Both have their adjoint here,
# so that any order of derivative is made of the same three operations.


@operation(label="EinsumBackward0")
def _rearrange(x, *, letters, output):
    """Take the diagonal over repeated letters, sum over letters not in `output`, and permute."""
    out = narrowed(array_module(x).einsum(f"{letters}->{output}", widened(x)), x.dtype)
    return out.copy() if len(set(letters)) == len(output) else out  # einsum may return a view


@operation(label="EinsumBackward0")
def _spread(x, *, letters, output, shape):
    """Put x on the diagonal over letters repeated in `output`, and repeat it along new ones."""
    xp = array_module(x)
    known = sorted(letters, key=output.index)
    x = x.transpose([letters.index(letter) for letter in known])
    firsts = {letter: output.index(letter) for letter in output}
    x = x.reshape(
        [
            size if letter in letters and firsts[letter] == axis else 1
            for axis, (letter, size) in enumerate(zip(output, shape, strict=True))
        ]
    )
    x = xp.broadcast_to(
        x,
        [
            size if firsts[letter] == axis else 1
            for axis, (letter, size) in enumerate(zip(output, shape, strict=True))
        ],
    )
    for axis, letter in enumerate(output):
        if firsts[letter] != axis:
            diagonal = [1] * len(shape)
            diagonal[firsts[letter]] = diagonal[axis] = shape[axis]
            on_diagonal = xp.eye(shape[axis], dtype=bool).reshape(diagonal)
            x = narrowed(xp.where(on_diagonal, x, xp.zeros((), x.dtype)), x.dtype)
    return x.copy()


@operation(label="EinsumBackward0")
def _contract(x, y, *, x_letters, y_letters, output):
    """Multiply x and y and sum over shared letters not in `output`: one product, or one batch."""
    shared = [letter for letter in x_letters if letter in y_letters]
    batch = [letter for letter in shared if letter in output]
    summed = [letter for letter in shared if letter not in output]
    x_alone = [letter for letter in x_letters if letter not in y_letters]
    y_alone = [letter for letter in y_letters if letter not in x_letters]
    sizes = dict(zip(x_letters + y_letters, x.shape + y.shape, strict=True))

    def arranged(array: Any, letters: str, *groups: list[str]) -> Any:
        order = [letters.index(letter) for group in groups for letter in group]
        return array.transpose(order).reshape(
            [math.prod(sizes[i] for i in group) for group in groups]
        )

    batches = [batch] if batch else []
    product = kernels.matmul(
        arranged(x, x_letters, *batches, x_alone, summed),
        arranged(y, y_letters, *batches, summed, y_alone),
    )
    found = [*batch, *x_alone, *y_alone]
    product = product.reshape([sizes[letter] for letter in found])
    return product.transpose([found.index(letter) for letter in output])


_rearrange.pullbacks(
    x=lambda grad, x_shape, letters, output: _spread(
        grad, letters=output, output=letters, shape=x_shape
    )
)
_spread.pullbacks(x=lambda grad, letters, output: _rearrange(grad, letters=output, output=letters))
_contract.pullbacks(
    x=lambda grad, y, x_letters, y_letters, output: _contract(
        grad, y, x_letters=output, y_letters=y_letters, output=x_letters
    ),
    y=lambda grad, x, x_letters, y_letters, output: _contract(
        x, grad, x_letters=x_letters, y_letters=output, output=y_letters
    ),
)


def einsum(equation: str, *operands: Any) -> Any:
    """Return the sum of products that `equation` names, such as "bij,bjk->bik".

    Letters that the output lacks are summed over, a letter repeated in one operand takes the
    diagonal, an ellipsis stands for axes that broadcast. Without "->" the output has the ellipsis
    and every letter that stands once, in alphabetical order. Operands are contracted in order.
    Raises ValueError for an equation that is malformed or does not fit, TypeError if dtypes differ.
    """
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if autocast_mode.dtype is not None:
        operands = tuple(map(lowered, operands))
    if any(x.dtype != operands[0].dtype for x in operands):
        dtypes = ", ".join(str(x.dtype) for x in operands)
        raise TypeError(f"einsum: operands must have one dtype; got dtypes {dtypes}")
    terms, output = _parse(equation, [x.ndim for x in operands])
    effective = _effective_terms(equation, terms, operands)
    if len(operands) == 1:
        return _rearrange(operands[0], letters=terms[0], output=output)
    result, found = None, ""
    for position, (x, term) in enumerate(zip(operands, terms, strict=True)):
        later = output + "".join(effective[position + 1 :])
        others = later + "".join(effective[:position])
        kept = "".join(letter for letter in effective[position] if letter in others)
        part = _rearrange(x, letters=term, output=kept) if kept != term else x
        if result is None:
            result, found = part, kept
            continue
        both = "".join(letter for letter in dict.fromkeys(found + kept) if letter in later)
        both = output if position + 1 == len(operands) else both
        result = _contract(result, part, x_letters=found, y_letters=kept, output=both)
        found = both
    return result if found == output else _rearrange(result, letters=found, output=output)


def _parse(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """Return the letters of each operand and of the output, ellipses spelled out."""
    left, arrow, output = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        _refuse_equation(
            equation, "must name every operand (one term each)", f"{len(ranks)} operands"
        )
    spare = [letter for letter in _LETTERS if letter not in equation]
    widest = 0
    for position, (term, rank) in enumerate(zip(terms, ranks, strict=True)):
        width = rank - len(term.replace("...", ""))
        if width < 0 or (width and "..." not in term):
            _refuse_equation(
                equation, "must name every axis", f"operand {position} with {rank} axes"
            )
        widest = max(widest, width)
        terms[position] = term.replace("...", "".join(spare[:width][::-1]))
    ellipsis = "".join(spare[:widest][::-1])
    if arrow:
        output = output.replace("...", ellipsis)
    else:
        joined = "".join(terms)
        output = ellipsis + "".join(
            sorted(x for x in set(joined) if joined.count(x) == 1 and x not in ellipsis)
        )
    letters = "".join(terms)
    if not set(letters + output) <= set(_LETTERS):
        _refuse_equation(
            equation, "must be made of letters, commas, '->' and ellipses", repr(equation)
        )
    if len(set(output)) != len(output) or not set(output) <= set(letters):
        rule = "must have output letters that differ and that an operand has"
        _refuse_equation(equation, rule, f"output {output!r}")
    return terms, output


def _effective_terms(equation: str, terms: list[str], operands: Any) -> list[str]:
    """Return each operand's letters, once each, without axes of 1 that broadcast."""
    sizes: dict[str, int] = {}
    for term, x in zip(terms, operands, strict=True):
        for letter, size in zip(term, x.shape, strict=True):
            known = sizes.setdefault(letter, size)
            if known == 1 and term.count(letter) == 1:
                sizes[letter] = size
            elif size != known and (size != 1 or term.count(letter) > 1):
                shapes = ", ".join(str(tuple(x.shape)) for x in operands)
                _refuse_equation(equation, f"must give {letter!r} one size", f"shapes {shapes}")
    return [
        "".join(i for i in dict.fromkeys(term) if x.shape[term.index(i)] == sizes[i])
        for term, x in zip(terms, operands, strict=True)
    ]


def _refuse_equation(equation: str, rule: str, got: str) -> None:
    raise ValueError(f"einsum: the equation {rule}; got equation={equation!r} and {got}")


_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
