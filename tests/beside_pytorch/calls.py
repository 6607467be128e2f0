"""How each operation is called: the shapes and options of its calls, right ones and wrong ones.

A signature gives an operation's calls: every one of its shapes with every one of its options. Each call
is then made on inputs of every kind (`inputs.KINDS`), and so is each row of the table of operations
(tests/cases).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tests.beside_pytorch.comparison import Call, function
from tests.beside_pytorch.inputs import DTYPES, KINDS, ordinary, pairs_of_dtypes, variations

Shapes = tuple[Any, ...]  # of each input its shape, or the array itself
FEW = ("float64", "float32", "int64", "edges")  # kinds for options of which there are many


class Signature(NamedTuple):
    """Calls of some operations: names, the shapes of their inputs, and options by position or keyword."""

    names: tuple[str, ...]
    shapes: tuple[Shapes, ...]
    options: tuple[tuple[Any, ...], ...] = ((),)
    kinds: Any = tuple(KINDS)
    together: bool = False  # the inputs are passed as one list


def product(**choices: Any) -> tuple[tuple[Any, ...], ...]:
    """Return every combination of options, each a tuple that ends with a dict of keywords."""
    return tuple(
        ({key: value for key, value in zip(choices, values, strict=True) if value != ()},)
        for values in itertools.product(*choices.values())
    )


def _split(options: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if options and isinstance(options[-1], dict):
        return options[:-1], options[-1]
    return options, {}


def _runner(name: str, options: tuple[Any, ...], together: bool) -> Callable[..., Any]:
    arguments, keywords = _split(options)

    def run(library: Any, *tensors: Any) -> Any:
        # An option may be a function of the library: a dtype, say.
        made, named = (
            [a(library) if callable(a) else a for a in arguments],
            {key: a(library) if callable(a) else a for key, a in keywords.items()},
        )
        given = [list(tensors)] if together else tensors
        return function(library, name)(*given, *made, **named)

    return run


def calls_of(signature: Signature) -> Iterator[Call]:
    """Give the calls of a signature on inputs of every kind."""
    for name, shapes, options in itertools.product(
        signature.names, signature.shapes, signature.options
    ):
        inputs = tuple(
            shape if isinstance(shape, np.ndarray) else ordinary(shape, place)
            for place, shape in enumerate(shapes)
        )
        sizes = " ".join(str(array.shape).replace(" ", "") for array in inputs)
        run = _runner(name, options, signature.together)
        for kind, arrays in variations(inputs, signature.kinds):
            yield Call(name, f"{sizes} {_words(options)} {kind}", run, arrays)


def _words(options: tuple[Any, ...]) -> str:
    arguments, keywords = _split(options)
    words = [*map(_word, arguments), *(f"{key}={_word(value)}" for key, value in keywords.items())]
    return "; ".join(words)


def _word(value: Any) -> str:
    return value.__name__ if callable(value) else repr(value).replace(" ", "")


def dtype(name: str) -> Callable[[Any], Any]:
    """Return an option: the library's dtype of this name."""

    def get(library: Any) -> Any:
        return getattr(library, name)

    get.__name__ = name
    return get


# ---- elementwise ---------------------------------------------------------------------------------

ANY_RANK = (((3, 4),), ((),), ((0, 3),), ((2, 1, 5),))
PLAIN = (((3, 4),), ((),), ((0, 3),))
FUNCTIONS = (
    *("abs", "absolute", "neg", "negative", "sign", "square", "sqrt", "rsqrt", "reciprocal"),
    *("exp", "expm1", "log", "log2", "log10", "log1p", "sigmoid", "erf"),
    *("sin", "cos", "tan", "tanh", "floor", "ceil", "round", "trunc"),
    *("isnan", "isinf", "isfinite", "logical_not", "bitwise_not"),
    *("relu", "relu6", "silu", "logsigmoid", "clone", "ravel"),
)
ACTIVATIONS = (
    Signature(("hardtanh",), PLAIN, ((), (-0.5, 1.5), (0.0, 6.0), (1.0, 1.0), (2.0, 1.0))),
    Signature(("leaky_relu",), PLAIN, ((), (0.3,), (0.0,), (-0.2,))),
    Signature(("elu",), PLAIN, ((), (0.7,), (0.0,), (-0.5,))),
    Signature(("gelu",), PLAIN, ((), ({"approximate": "tanh"},), ({"approximate": "other"},))),
    Signature(("softplus",), PLAIN, ((), (2.0,), (1.0, 0.5), (-1.0,))),
    Signature(
        ("softmax", "log_softmax"),
        (((3, 4),), ((),), ((0, 3),), ((3, 0),), ((2, 3, 2),)),
        tuple(({"dim": dim},) for dim in (0, 1, -1, 2, -4)),
    ),
    Signature(("dropout",), PLAIN, ((0.0,), (1.0,), (0.3, False), (-0.1,), (1.5,), (1.5, False))),
    Signature(
        ("round",),
        PLAIN,
        tuple(({"decimals": decimals},) for decimals in (0, 1, -1)),
    ),
    Signature(
        ("clamp", "clip"),
        PLAIN,
        (
            *((-0.5, 1), (0, None), (None, 0.5), (1, -1), (None, None), (2,), (0, 2), (-1, 1)),
            *((float("nan"), 1.0), (float("-inf"), 0.5), ({"max": 0},), ({"min": -0.0},)),
        ),
    ),
    Signature(("clamp",), (((3, 4), (4,), (3, 1)), ((3, 4), (), ()), ((3,), (2, 3), (2, 1)))),
)
ARITHMETIC = ("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide")
BINARY = (
    *ARITHMETIC,
    *("floor_divide", "remainder", "pow", "maximum", "minimum", "max", "min"),
    *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor"),
    *("bitwise_and", "bitwise_or", "bitwise_xor"),
)
BROADCAST = (
    ((3, 4), (3, 4)),
    ((3, 1), (4,)),
    ((2, 3), ()),
    ((), (2, 3)),
    ((), ()),
    ((1,), (0,)),
    ((0, 3), (3,)),
    ((2, 1, 3), (4, 1)),
    ((2, 3), (3, 2)),
    ((3,), (4,)),
)
NUMBERS = (2, -1, 0, 0.5, -2.5, float("inf"), float("nan"), True)
BESIDE_NUMBERS = (
    *("add", "sub", "mul", "div", "floor_divide", "remainder", "pow"),
    *("eq", "ne", "lt", "le", "gt", "ge"),
    *("bitwise_and", "bitwise_or", "bitwise_xor"),
)
ELEMENTWISE = (
    Signature(FUNCTIONS, ANY_RANK),
    *ACTIVATIONS,
    Signature(BINARY, BROADCAST),
    Signature(BESIDE_NUMBERS, (((3, 4),), ((),)), tuple((number,) for number in NUMBERS)),
    Signature(
        ("add", "sub"),
        (((3, 4), (4,)), ((2,), ())),
        tuple(({"alpha": alpha},) for alpha in (2, 0.5, -1, True)),
    ),
    Signature(
        ("div", "divide", "true_divide"),
        (((3, 4), (4,)), ((2,), ())),
        tuple(({"rounding_mode": mode},) for mode in (None, "floor", "trunc", "up")),
    ),
    Signature(
        ("isclose", "allclose"),
        (((3, 4), (3, 4)), ((3, 1), (4,)), ((), (2,)), ((0,), (0,)), ((2,), (3,))),
        ((), (0.5, 0.1), ({"equal_nan": True},), ({"rtol": -1.0},)),
    ),
    Signature(("equal",), (((3, 4), (3, 4)), ((3, 4), (4,)), ((), ()), ((0,), (0,)))),
    Signature(
        ("where",),
        (
            (np.eye(3, 4) > 0, (3, 4), (3, 4)),
            (np.array([True, False, True]), (3, 1), (3,)),
            (np.array(True), (), (2,)),
            (np.zeros((0, 2), bool), (2,), ()),
            (np.array([True, False]), (3,), ()),
        ),
    ),
    Signature(("where",), ((np.eye(3) > 0, (3, 3)),), ((0.5,), (2,), (float("nan"),))),
    Signature(("where",), ((np.eye(3) > 0,), (np.array(True),), (np.zeros((0, 2), bool),))),
)

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "floor_divide": operator.floordiv,
    "remainder": operator.mod,
    "pow": operator.pow,
    "bitwise_and": operator.and_,
    "bitwise_or": operator.or_,
    "bitwise_xor": operator.xor,
    "lt": operator.lt,
    "eq": operator.eq,
}


def _operators() -> Iterator[Call]:
    """Give what is written with Python's operators and a number on the left."""
    for name, apply in OPERATORS.items():
        for number in NUMBERS:
            for kind, arrays in variations((ordinary((3, 4), 0),)):
                run = lambda library, x, apply=apply, number=number: apply(number, x)  # noqa: E731
                yield Call(name, f"operator, {number} on the left {kind}", run, arrays)


def _mixed_dtypes() -> Iterator[Call]:
    """Give the pairs of dtypes of operations on two inputs, of which either may be 0-d."""
    names = ("add", "sub", "mul", "div", "floor_divide", "remainder", "pow", "maximum", "minimum")
    others = ("eq", "lt", "logical_and", "bitwise_and", "matmul", "dot", "isclose", "outer")
    losses = ("mse_loss", "l1_loss", "huber_loss", "binary_cross_entropy_with_logits")
    for name in (*names, *others, *losses):
        matrices = name in ("matmul", "dot", "outer")
        for shapes in (((3,), (3,)),) if matrices else (((2, 3), (3,)), ((), (3,)), ((3,), ())):
            inputs = tuple(ordinary(shape, place) for place, shape in enumerate(shapes))
            for kind, arrays in pairs_of_dtypes(inputs):
                yield Call(name, f"{shapes} {kind}", _runner(name, (), False), arrays)
    for name in ("cat", "stack", "hstack", "vstack"):
        for kind, arrays in pairs_of_dtypes((ordinary((3,), 0), ordinary((3,), 1))):
            yield Call(name, kind, _runner(name, (), True), arrays)
    for kind, arrays in pairs_of_dtypes((ordinary((3,), 0), ordinary((3,), 1))):
        condition = np.array([True, False, True])
        yield Call("where", kind, _runner("where", (), False), (condition, *arrays))


# ---- reductions ----------------------------------------------------------------------------------

CUBE = (((2, 3, 4),), ((3, 4),), ((5,),), ((),))
EMPTY = (((0, 3),), ((3, 0),), ((0,),))
DIMS: tuple[Any, ...] = (None, 0, 1, -1, (0, 1), (-1, 0), (), 3, -4, (0, 0), (0, -5))
ONE_DIM = (0, 1, -1, 3, -4)
REDUCTIONS = (
    Signature(("sum", "mean", "any", "all", "count_nonzero", "amax", "amin", "prod"), CUBE),
    Signature(("max", "min", "argmax", "argmin", "var", "std", "norm"), CUBE),
    Signature(
        ("sum", "mean", "amax", "amin", "any", "all"),
        CUBE,
        tuple((dim, keep) for dim in DIMS for keep in (False, True)),
        FEW,
    ),
    Signature(("sum", "mean", "any", "all"), EMPTY, ((), (0,), (1, True), ((0, 1),)), FEW),
    Signature(("amax", "amin"), EMPTY, ((), (0,), (1, True), ((0, 1),)), FEW),
    Signature(
        ("sum", "mean", "prod"),
        (((2, 3),), ((),), ((0,),)),
        tuple(({"dtype": dtype(name)},) for name in DTYPES),
    ),
    Signature(("count_nonzero",), (*CUBE, *EMPTY), tuple((dim,) for dim in DIMS), FEW),
    Signature(
        ("prod", "max", "min", "argmax", "argmin"),
        (*CUBE, *EMPTY),
        tuple((dim, keep) for dim in ONE_DIM for keep in (False, True)),
        (*FEW, "ties"),
    ),
    Signature(("argmax", "argmin"), CUBE, ((None, True),), FEW),
    Signature(("max", "min", "argmax", "argmin", "prod", "var", "std", "norm"), EMPTY),
    Signature(("cumsum",), (*CUBE, *EMPTY), tuple((dim,) for dim in ONE_DIM), (*FEW, "bool")),
    Signature(("cumsum",), (((2, 3),),), tuple((0, {"dtype": dtype(name)}) for name in DTYPES)),
    Signature(
        ("logsumexp",),
        (*CUBE, *EMPTY),
        tuple((dim, keep) for dim in DIMS if dim is not None for keep in (False, True)),
        FEW,
    ),
    Signature(
        ("var", "std"),
        (*CUBE, ((1, 3),), *EMPTY),
        (
            *product(dim=(None, 0, (-1, 0), (), 4), correction=(0, 1, 2.5), keepdim=(False, True)),
            *((0, True), (0, False), (1, False, True), (True,), (False,)),
        ),
        ("float64", "edges"),
    ),
    Signature(
        ("norm",),
        (*CUBE, *EMPTY),
        tuple(
            (p, {"dim": dim, "keepdim": keep})
            for p in ("fro", 0, 1, 2, 3, 0.5, -1.5, float("inf"), float("-inf"), "other")
            for dim, keep in ((None, True), (0, False), (-1, True), ((0, 1), False), (5, False))
        ),
        ("float64", "edges", "ties"),
    ),
)

# ---- shapes --------------------------------------------------------------------------------------

SHAPES = (
    Signature(
        ("reshape", "view"),
        (((2, 3, 4),), ((),), ((0, 3),), ((6, 4),)),
        tuple((s,) for s in ((4, 6), (-1,), (2, -1, 3), (1,), (), (0, 7), (-1, -1), (5, 5), (-2,))),
    ),
    Signature(
        ("flatten",),
        (((2, 3, 4),), ((),), ((0, 3),)),
        ((), (1,), (0, 1), (1, 2), (2, 1), (-2, -1), (3,), (1, 1)),
    ),
    Signature(
        ("unflatten",),
        (((2, 12),), ((6,),), ((0, 4),)),
        (
            (1, (3, 4)),
            (-1, (2, -1)),
            (0, (2, 1)),
            (0, (-1, -1)),
            (1, (5, 5)),
            (0, (0, -1)),
            (4, (2,)),
        ),
    ),
    Signature(("unsqueeze",), PLAIN, tuple((dim,) for dim in (0, 1, -1, 2, -3, 3, -4))),
    Signature(
        ("squeeze",),
        (((1, 3, 1),), ((),), ((0, 1),), ((2, 3),)),
        ((), (0,), (1,), (-1,), ((0, -1),), ((0, 1),), ((),), (3,), ((0, 0),)),
    ),
    Signature(
        ("permute",),
        (((2, 3, 4),), ((3, 4),), ((),)),
        tuple((dims,) for dims in ((2, 0, 1), (1, 0), (-1, 0, 1), (0, 0, 1), (), (0,), (0, 1, 5))),
    ),
    Signature(
        ("transpose", "swapaxes"),
        (((2, 3, 4),), ((3,),), ((),), ((0, 2),)),
        ((0, 1), (-1, 0), (1, 1), (0, 0), (0, 3), (-5, 0), (0, -1)),
    ),
    Signature(("t",), (((3, 4),), ((3,),), ((),), ((2, 3, 4),), ((0, 2),))),
    Signature(
        ("movedim",),
        (((2, 3, 4),), ((3,),), ((),)),
        (
            (0, 2),
            (0, -1),
            ((0, 1), (1, 2)),
            ((2, 0), (0, 1)),
            ((0, 0), (1, 2)),
            ((0, 1), (1,)),
            (5, 0),
        ),
    ),
    Signature(
        ("flip",),
        (((2, 3, 4),), ((5,),), ((),), ((0, 3),)),
        tuple((dims,) for dims in ((0,), (0, -1), (), (1,), (0, 0), (4,))),
    ),
    Signature(
        ("roll",),
        (((2, 3, 4),), ((5,),), ((0, 3),), ((),)),
        (
            (1,),
            (-7,),
            (2, 0),
            (1, -1),
            ((1, 2), (0, 1)),
            ((1, 2), (0, 0)),
            ((1, 2), 0),
            (1, 5),
            ((1, 2),),
        ),
    ),
    Signature(
        ("expand", "broadcast_to"),
        (((3, 1),), ((1,),), ((),), ((0, 1),)),
        tuple(
            (s,)
            for s in (
                (3, 4),
                (2, 3, 1),
                (-1, 4),
                (3, -1),
                (-1, 3, 4),
                (0,),
                (3,),
                (2, 4),
                (5, 0, 2),
            )
        ),
    ),
    Signature(("broadcast_tensors",), (((3, 1), (4,)), ((), (2,)), ((0, 1), (3,)), ((2,), (3,)))),
    Signature(
        ("meshgrid",),
        (((2,), (3,)), ((2,), ()), ((2,), (0,), (1,)), ((2, 2), (1,)), ((4,),)),
        (({"indexing": "ij"},), ({"indexing": "xy"},), ({"indexing": "yx"},)),
    ),
    Signature(
        ("repeat", "tile"),
        (((3, 4),), ((),), ((0, 2),)),
        tuple((n,) for n in ((2,), (2, 1), (1, 2, 3), (0, 2), (), (2, -1))),
    ),
    Signature(
        ("tril", "triu"),
        (((3, 4),), ((2, 3, 3),), ((0, 3),), ((3,),), ((),)),
        tuple((d,) for d in (0, 1, -1, 5, -5)),
    ),
    Signature(
        ("diagonal",),
        (((3, 4),), ((2, 3, 3),), ((0, 3),), ((3,),)),
        ((), (1,), (-2,), (5,), (0, 1, 0), (0, -1, -2), (0, 0, 0), (0, 0, 4)),
    ),
    Signature(
        ("diag",), (((3, 4),), ((3,),), ((0,),), ((2, 2, 2),), ((),)), ((), (1,), (-2,), (5,))
    ),
    Signature(
        ("narrow",),
        (((3, 4),), ((5,),), ((),)),
        (
            (0, 0, 2),
            (1, 1, 2),
            (-1, -2, 2),
            (0, 1, 0),
            (0, 3, 0),
            (0, 2, 5),
            (0, -6, 1),
            (0, 0, -1),
            (3, 0, 1),
        ),
    ),
    Signature(
        ("split",),
        (((5, 4),), ((4,),), ((0, 3),), ((),)),
        (
            (2,),
            (3, 1),
            ([1, 3], -1),
            ([4, 1],),
            (5,),
            (0,),
            (-1,),
            ([2, 2, 2],),
            (2, 4),
            ([],),
            ([0, 5],),
        ),
    ),
    Signature(
        ("chunk",),
        (((5, 4),), ((4,),), ((0, 3),), ((),)),
        ((2,), (3, 1), (4, -1), (1,), (7,), (0,), (-1,), (2, 4)),
    ),
    Signature(
        ("unbind",), (((3, 4),), ((2,),), ((0, 3),), ((3, 0),), ((),)), ((), (1,), (-1,), (4,))
    ),
    Signature(
        ("pad",),
        (((2, 3, 4),), ((1, 2, 4, 5),), ((5,),), ((0, 3),)),
        (
            *((w,) for w in ((1, 2), (1, 0, 2, 1), (-1, 1), (), (1,), (-2, -2), (-9, 1), (0, 0))),
            *(((1, 1), "constant", 2.5), ((0, 1), "constant", -1), ((1, 1), "other")),
            *(
                (w, mode)
                for w in ((1, 2), (1, 0, 2, 1), (0, 0), (4, 0), (-1, 1))
                for mode in ("reflect", "replicate", "circular")
            ),
        ),
        FEW,
    ),
)
JOINING = (
    Signature(
        ("cat", "concat", "concatenate"),
        (
            ((2, 3), (1, 3)),
            ((2, 3), (2, 3)),
            ((0,), (2, 3)),
            ((0, 3), (2, 3)),
            ((2,), (2, 3)),
            ((), ()),
        ),
        ((), (1,), (-1,), (4,)),
        together=True,
    ),
    Signature(
        ("stack",),
        (((2, 3), (2, 3)), ((), ()), ((0,), (0,)), ((2,), (3,)), ((3,),)),
        ((), (1,), (-1,), (-3,), (4,)),
        together=True,
    ),
    Signature(
        ("hstack", "vstack"),
        (
            ((2,), (3,)),
            ((2, 3), (2, 1)),
            ((2, 3), (1, 3)),
            ((), ()),
            ((2, 3), (3,)),
            ((0,), (2,)),
            ((3,),),
        ),
        together=True,
    ),
    Signature(("cat", "stack", "hstack", "vstack"), ((),), together=True),
)

# ---- indexing ------------------------------------------------------------------------------------

ROWS = np.array([[0, 2, 1, 0], [2, 2, 0, 1]])
WIDE = np.array([[0, 2, 1], [2, 2, 0], [0, 0, 0]])
TOO_FAR, NEGATIVE = ROWS + 2, ROWS - 3
MASK = np.array([[True, False, True, False], [False] * 4, [True] * 4])
LINE = np.array([2, 0, 2])
INDEXING = (
    Signature(
        ("gather",),
        (),
    ),
    Signature(
        ("masked_fill",),
        (((3, 4), MASK), ((4,), MASK), ((3, 1), MASK), ((), MASK), ((2, 4), MASK)),
        ((2,), (-0.5,), (float("nan"),), (True,)),
    ),
    Signature(
        ("masked_select",),
        (
            ((3, 4), MASK),
            ((4,), MASK),
            ((3, 1), MASK),
            ((), np.array(True)),
            ((0, 2), np.zeros((0, 2), bool)),
            ((2, 4), MASK),
            ((3, 4), ROWS),
        ),
    ),
    Signature(
        ("nonzero",),
        (*ANY_RANK, ((5,),)),
        ((), ({"as_tuple": True},)),
        (*DTYPES, "ties", "edges", "strided"),
    ),
    Signature(
        ("sort", "argsort"),
        (((3, 4),), ((5,),), ((),), ((0, 3),), ((3, 0),)),
        (*product(dim=(0, -1, 3), descending=(False, True), stable=(True,)),),
    ),
    Signature(
        ("topk",),
        (((3, 4),), ((5,),), ((),), ((0, 3),)),
        (*product(k=(0, 1, 2, 4, 9, -1), dim=(0, -1, 3), largest=(False, True)),),
        ("float64", "float32", "int64"),
    ),
)


def _indexed() -> Iterator[Call]:
    """Give the calls of operations whose index stands between a dim and a source."""
    signatures = [
        ("gather", ((3, 4), 0, ROWS)),
        ("gather", ((3, 4), 1, WIDE)),
        ("gather", ((3, 4), -2, ROWS[:, :2])),
        ("gather", ((3, 4), 0, ROWS.astype(np.int32))),
        ("gather", ((3, 4), 0, TOO_FAR)),
        ("gather", ((3, 4), 0, NEGATIVE)),
        ("gather", ((3, 4), 1, np.zeros((5, 1), int))),
        ("gather", ((3, 4), 0, LINE)),
        ("gather", ((3, 4), 2, ROWS)),
        ("gather", ((3, 4), 0, ROWS / 1.5)),
        ("gather", ((3, 4), 0, np.zeros((0, 4), int))),
        ("gather", ((), 0, np.array(0))),
        ("gather", ((5,), 0, np.array([4, 4, 0]))),
        ("gather", ((0, 3), 1, np.zeros((0, 2), int))),
        ("take_along_dim", ((3, 4), ROWS, 0)),
        ("take_along_dim", ((3, 4), ROWS)),
        ("take_along_dim", ((3, 4), NEGATIVE, 0)),
        ("take_along_dim", ((1, 4), np.zeros((3, 1), int), 1)),
        ("take_along_dim", ((3, 4), LINE, 0)),
        ("take_along_dim", ((3, 4), TOO_FAR, 0)),
        ("take_along_dim", ((3, 4), ROWS / 1.5, 0)),
        ("take", ((3, 4), ROWS)),
        ("take", ((3, 4), np.array([11, -12, 0]))),
        ("take", ((3, 4), np.array([12]))),
        ("take", ((3, 4), np.array(5))),
        ("take", ((3, 4), np.zeros((0, 2), int))),
        ("take", ((), np.array([0, 0]))),
        ("take", ((3, 4), ROWS / 1.5)),
        ("index_select", ((3, 4), 0, LINE)),
        ("index_select", ((3, 4), 1, np.array([3, 3], np.int32))),
        ("index_select", ((3, 4), -1, np.array(1))),
        ("index_select", ((3, 4), 0, np.array([3]))),
        ("index_select", ((3, 4), 0, np.array([-1]))),
        ("index_select", ((3, 4), 0, ROWS)),
        ("index_select", ((3, 4), 2, LINE)),
        ("index_select", ((3, 4), 0, np.zeros(0, int))),
        ("index_select", ((), 0, np.array([0]))),
        ("index_select", ((3, 4), 0, LINE / 1.5)),
        ("index_add", ((3, 4), 0, LINE, (3, 4))),
        ("index_add", ((3, 4), 1, np.array([1, 1]), (3, 2))),
        ("index_add", ((3, 4), -1, np.array([1, 1], np.int32), (3, 2), {"alpha": 2})),
        ("index_add", ((3, 4), 0, LINE, (2, 4))),
        ("index_add", ((3, 4), 0, LINE + 1, (3, 4))),
        ("index_add", ((3, 4), 3, LINE, (3, 4))),
        ("index_add", ((5,), 0, np.zeros(0, int), (0,))),
        ("index_add", ((3, 4), 0, LINE, (3, 4), {"alpha": 0.5})),
        ("scatter_add", ((3, 4), 0, ROWS, (2, 4))),
        ("scatter_add", ((3, 4), 1, WIDE, (3, 4))),
        ("scatter_add", ((3, 4), -2, ROWS[:, :2], (4, 4))),
        ("scatter_add", ((3, 4), 0, TOO_FAR, (2, 4))),
        ("scatter_add", ((3, 4), 0, ROWS, (1, 4))),
        ("scatter_add", ((3, 4), 0, LINE, (3,))),
        ("scatter_add", ((3, 4), 0, np.zeros((0, 4), int), (2, 4))),
        ("scatter_add", ((5,), 0, np.array([1, 1, 1]), (3,))),
        ("scatter_add", ((), 0, np.array(0), ())),
        ("scatter", ((3, 4), 0, ROWS[:1], (2, 4))),
        ("scatter", ((3, 4), 1, np.array([[3, 0, 1]] * 3), (3, 4))),
        ("scatter", ((3, 4), 0, ROWS, 2.5)),
        ("scatter", ((3, 4), 0, ROWS, 2)),
        ("scatter", ((3, 4), 0, TOO_FAR, (2, 4))),
        ("scatter", ((3, 4), 0, ROWS, (1, 4))),
        ("scatter", ((5,), 0, np.array([1, 4]), (2,))),
        ("scatter", ((), 0, np.array(0), ())),
        ("scatter", ((3, 4), 0, np.zeros((0, 4), int), (2, 4))),
        ("one_hot", (ROWS,)),
        ("one_hot", (ROWS, 5)),
        ("one_hot", (ROWS, 2)),
        ("one_hot", (NEGATIVE,)),
        ("one_hot", (np.array(2),)),
        ("one_hot", (np.zeros((0, 2), int), 3)),
        ("one_hot", (np.zeros((0, 2), int),)),
        ("one_hot", (ROWS / 1.5,)),
        ("one_hot", (ROWS.astype(np.int32),)),
        ("masked_fill", ((3, 4), MASK, ())),
        ("masked_fill", ((3, 4), MASK, (1,))),
        ("masked_fill", ((3, 4), MASK.astype(np.int64), 2.0)),
    ]
    for name, arguments in signatures:
        yield from _arranged(name, arguments)


def _arranged(name: str, arguments: tuple[Any, ...]) -> Iterator[Call]:
    """Give calls whose tensors stand anywhere among the arguments: shapes (tuples) and arrays are tensors."""
    positions = [p for p, a in enumerate(arguments) if isinstance(a, tuple | np.ndarray)]
    inputs = tuple(
        a if isinstance(a, np.ndarray) else ordinary(a, p)
        for p, a in enumerate(arguments)
        if p in positions
    )

    def run(library: Any, *tensors: Any) -> Any:
        placed = dict(zip(positions, tensors, strict=True))
        values, keywords = _split(tuple(placed.get(p, a) for p, a in enumerate(arguments)))
        return function(library, name)(*values, **keywords)

    # Index arrays that are float64 on purpose, as a mistake, stay so in every kind but are cast with the rest
    words = ", ".join(
        f"{a.dtype}{list(a.shape)}" if isinstance(a, np.ndarray) else str(a) for a in arguments
    )
    first = arguments[2] if len(arguments) > 2 and isinstance(arguments[2], np.ndarray) else None
    detail = "" if first is None or first.size == 0 else f" {first.min()}..{first.max()}"
    for kind, arrays in variations(inputs):
        yield Call(name, f"{words}{detail} {kind}", run, arrays)


BRACKETS: dict[str, Callable[[Any], Any]] = {
    "int": lambda lib: 1,
    "negative": lambda lib: -1,
    "out": lambda lib: 5,
    "pair": lambda lib: (0, 2),
    "slice": lambda lib: slice(1, None),
    "step": lambda lib: (slice(None), slice(0, 4, 2)),
    "empty slice": lambda lib: slice(2, 1),
    "None": lambda lib: (None, slice(None), None),
    "Ellipsis": lambda lib: (..., 0),
    "two Ellipsis": lambda lib: (..., ..., 0),
    "too many": lambda lib: (0, 0, 0),
    "list": lambda lib: ([0, 2, 2],),
    "tensor": lambda lib: lib.tensor([2, 0, 2]),
    "negative tensor": lambda lib: lib.tensor([-1, -3]),
    "tensor out": lambda lib: lib.tensor([3]),
    "int32": lambda lib: lib.tensor([1], dtype=lib.int32),
    "uint8": lambda lib: lib.tensor([1, 0, 1], dtype=lib.uint8),
    "0-d": lambda lib: lib.tensor(1),
    "matrix": lambda lib: lib.tensor([[0, 1], [2, 2]]),
    "two tensors": lambda lib: (lib.tensor([0, 2]), lib.tensor([[1], [3]])),
    "apart": lambda lib: (lib.tensor([0, 2]), None, lib.tensor([1, 3])),
    "slice, tensor": lambda lib: (slice(0, 2), lib.tensor([1, 1, 3])),
    "do not broadcast": lambda lib: (lib.tensor([0, 1, 2]), lib.tensor([0, 1])),
    "mask": lambda lib: lib.tensor(MASK.tolist()),
    "row mask": lambda lib: lib.tensor([True, False, True]),
    "column mask": lambda lib: (slice(None), lib.tensor([True, False, True, False])),
    "mask and tensor": lambda lib: (lib.tensor([True, False, True]), lib.tensor([3, 0])),
    "wrong mask": lambda lib: lib.tensor([True, False]),
    "True": lambda lib: True,
    "False": lambda lib: False,
    "0-d mask": lambda lib: lib.tensor(True),
    "empty list": lambda lib: ([],),
    "empty tensor": lambda lib: lib.tensor([], dtype=lib.int64),
    "float tensor": lambda lib: lib.tensor([0.5]),
    "float": lambda lib: 0.5,
}


def _brackets() -> Iterator[Call]:
    """Give x[index] and x[index] = value."""
    for note, index in BRACKETS.items():
        for kind, arrays in variations((ordinary((3, 4), 0),)):
            yield Call("getitem", f"{note} {kind}", lambda lib, x, i=index: x[i(lib)], arrays)
        for shape in ((), (1,), (4,)):
            for kind, arrays in variations((ordinary((3, 4), 0), ordinary(shape, 1))):
                if kind != "expanded":
                    run = lambda lib, x, value, i=index: _written(lib, x, i, value)  # noqa: E731
                    yield Call("setitem", f"{note} {shape} {kind}", run, arrays)


def _written(library: Any, x: Any, index: Callable[[Any], Any], value: Any) -> Any:
    x = x.clone()
    x[index(library)] = value
    return x


# ---- products ------------------------------------------------------------------------------------

PRODUCTS = (
    Signature(
        ("matmul",),
        (
            *(((4,), (4,)), ((4,), (4, 3)), ((3, 4), (4,)), ((3, 4), (4, 2)), ((2, 3, 4), (4,))),
            *(((4,), (2, 4, 3)), ((2, 3, 4), (2, 4, 2)), ((2, 1, 3, 4), (3, 4, 2)), ((3, 0), (0, 2))),
            *(((0, 4), (4, 2)), ((0,), (0,)), ((), (3,)), ((3, 4), (3, 4)), ((2, 3, 4), (3, 4, 2))),
            *(((3, 4), (0, 4, 2)), ((1, 1), (1, 1))),
        ),
    ),
    Signature(
        ("mm",),
        (((3, 4), (4, 2)), ((3, 0), (0, 2)), ((3, 4), (3, 4)), ((4,), (4, 2)), ((2, 3, 4), (4, 2))),
    ),
    Signature(
        ("bmm",),
        (((2, 3, 4), (2, 4, 2)), ((1, 3, 4), (2, 4, 2)), ((0, 3, 4), (0, 4, 2)), ((3, 4), (4, 2))),
    ),
    Signature(("mv",), (((3, 4), (4,)), ((3, 0), (0,)), ((3, 4), (3,)), ((4,), (4,)))),
    Signature(("dot",), (((4,), (4,)), ((0,), (0,)), ((4,), (3,)), ((1,), (4,)), ((3, 4), (4,)), ((), ()))),
    Signature(("outer",), (((3,), (4,)), ((0,), (4,)), ((1,), (1,)), ((3, 4), (4,)), ((), (2,)))),
    Signature(
        ("linear",),
        (
            *(((3, 4), (2, 4)), ((3, 4), (2, 4), (2,)), ((4,), (2, 4), (2,)), ((2, 3, 4), (2, 4), (2,))),
            *(((0, 4), (2, 4), (2,)), ((3, 4), (4,)), ((3, 4), (2, 3)), ((3, 4), (2, 4), (3,))),
            ((3, 0), (2, 0)),
        ),
    ),
)  # fmt: skip
EQUATIONS = {
    "ij,jk->ik": ((2, 3), (3, 4)),
    "ij,jk": ((2, 3), (3, 4)),
    "bij,bjk->bik": ((2, 2, 3), (2, 3, 4)),
    "ii->i": ((3, 3),),
    "ii": ((3, 3),),
    "ij->ji": ((2, 3),),
    "ij->": ((2, 3),),
    "i,j->ij": ((2,), (3,)),
    "i,i->": ((3,), (3,)),
    "...ij,...jk->...ik": ((2, 1, 2, 3), (4, 3, 2)),
    "...i->...": ((2, 3),),
    "ij,kj,kl->il": ((2, 3), (4, 3), (4, 2)),
    "bn,anm,bm->ba": ((2, 3), (4, 3, 2), (2, 2)),
    " i j , j k -> i k ": ((2, 3), (3, 4)),
    "ij,jk->iz": ((2, 3), (3, 4)),
    "ij,jk->ii": ((2, 3), (3, 4)),
    "ij": ((2, 3, 4),),
    "ij,kl": ((2, 3),),
    "ij,jk->ik ": ((2, 3), (4, 4)),
    "i1->i": ((2, 3),),
    "ij,j->ij": ((2, 1), (3,)),
    "bij,bjk->ik": ((2, 2, 3), (2, 3, 4)),
    "a,a,a->a": ((3,), (3,), (3,)),
}


def _einsums() -> Iterator[Call]:
    for equation, shapes in EQUATIONS.items():
        inputs = tuple(ordinary(shape, place) for place, shape in enumerate(shapes))

        def run(library: Any, *tensors: Any, equation: str = equation) -> Any:
            return library.einsum(equation, *tensors)

        for kind, arrays in variations(inputs):
            yield Call("einsum", f"{equation} {kind}", run, arrays)


# ---- neural networks -----------------------------------------------------------------------------

LABELS = np.array([2, 0, 3])
IGNORED = np.array([2, -100, 3])
ALL_IGNORED = np.full(3, -100)
WRONG_LABELS = np.array([2, 4, 0])
PIXELS = np.array([[0, 2], [1, -100], [2, 2]])
REDUCTION = ("mean", "sum", "none", "other")
NETWORKS = (
    Signature(
        ("mse_loss", "l1_loss"),
        (((3, 4), (3, 4)), ((), ()), ((0,), (0,)), ((3, 4), (4,)), ((2,), (3,))),
        product(reduction=REDUCTION),
    ),
    Signature(
        ("smooth_l1_loss",),
        (((3, 4), (3, 4)), ((), ()), ((0,), (0,))),
        product(reduction=REDUCTION, beta=(1.0, 0.5, 0.0, -1.0)),
    ),
    Signature(
        ("huber_loss",),
        (((3, 4), (3, 4)), ((), ()), ((0,), (0,))),
        product(reduction=REDUCTION, delta=(1.0, 0.5, 0.0, -1.0)),
    ),
    Signature(
        ("binary_cross_entropy_with_logits",),
        (
            *(((3, 4), (3, 4)), ((), ()), ((0,), (0,)), ((3, 4), (4,))),
            *(((3, 4), (3, 4), (4,)), ((3, 4), (3, 4), (5,))),
        ),
        product(reduction=REDUCTION),
    ),
    Signature(
        ("nll_loss", "cross_entropy"),
        (
            *(((3, 4), labels) for labels in (LABELS, IGNORED, ALL_IGNORED, WRONG_LABELS, PIXELS)),
            *(((3, 4), LABELS[:2]), ((3, 4), LABELS.astype(np.int32)), ((3, 4), LABELS / 2)),
            *(((4,), np.array(2)), ((0, 4), LABELS[:0])),
            *(((3, 4, 2), PIXELS), ((3, 4), LABELS, (4,)), ((3, 4), IGNORED, (4,)), ((3, 4), LABELS, (3,))),
            *(((3, 4, 2), PIXELS, (4,)), ((), np.array(0))),
        ),
        (*product(reduction=REDUCTION), ({"ignore_index": 3},)),
        (*FEW, "ties", "strided"),
    ),
    Signature(
        ("cross_entropy",),
        (
            *(((3, 4), LABELS), ((3, 4), IGNORED, (4,)), ((3, 4), (3, 4)), ((3, 4, 2), (3, 4, 2))),
            *(((4,), (4,)), ((3, 4), (3, 3))),
        ),
        product(reduction=("mean", "sum", "none"), label_smoothing=(0.0, 0.2, 1.0, 1.5)),
        ("float64", "float32", "edges", "ties"),
    ),
    Signature(
        ("layer_norm",),
        (((2, 3, 4),), ((3, 4),), ((0, 4),), ((4,),)),
        (((4,),), ((3, 4),), ((5,),), ((),), ((4,), {"eps": 0.1})),
    ),
    Signature(
        ("conv2d",),
        (
            ((2, 4, 5, 6), (4, 4, 3, 3)),
            ((2, 4, 5, 6), (4, 2, 3, 2), (4,)),
            ((4, 5, 6), (2, 4, 1, 1), (2,)),
            ((0, 4, 5, 6), (4, 4, 3, 3)),
            ((2, 3, 5, 6), (4, 4, 3, 3)),
            ((2, 4, 2, 2), (4, 4, 3, 3)),
            ((2, 4), (4, 4, 3, 3)),
        ),
        (
            *product(stride=(1, (1, 2)), padding=(0, (2, 0)), dilation=(1, 2), groups=(1, 2)),
            *product(padding=("same", "valid", "other"), stride=(1, 2)),
            *(({"stride": 0},), ({"padding": -1},), ({"dilation": 0},), ({"groups": 0},), ({"groups": 3},)),
        ),
        ("float64",),
    ),
    Signature(
        ("conv1d",),
        (
            *(((2, 4, 7), (4, 4, 3)), ((2, 4, 7), (4, 2, 3), (4,)), ((4, 7), (2, 4, 1), (2,))),
            ((2, 4, 2), (4, 4, 3)),
        ),
        product(stride=(1, 2), padding=(0, 1), dilation=(1, 2), groups=(1, 2)),
        ("float64",),
    ),
    Signature(
        ("max_pool2d",),
        (((2, 3, 5, 6),), ((3, 5, 6),), ((0, 3, 5, 6),), ((2, 3, 1, 1),), ((5, 6),)),
        (
            *product(kernel_size=((2, 3),), stride=((), (1, 2)), padding=(0, 1), ceil_mode=(False, True)),
            *((2,), (2, 1), (0,), (2, 0), (2, 1, -1), (2, 1, 0, 0)),
        ),
        ("float64", "float32", "ties", "edges"),
    ),
    Signature(  # not of images so small that a window holds padding alone: PyTorch then frees wrong memory
        ("max_pool2d",),
        (((2, 3, 5, 6),), ((3, 5, 6),)),
        product(kernel_size=(2, 3), dilation=(1, 2), padding=(0, 1, 2), return_indices=(False, True)),
        ("float64", "float32", "ties", "edges"),
    ),
    Signature(
        ("avg_pool2d",),
        (((2, 3, 5, 6),), ((3, 5, 6),), ((0, 3, 5, 6),), ((2, 3, 1, 1),), ((5, 6),)),
        (
            *product(kernel_size=((2, 3),), stride=((), (1, 2)), padding=(0, 1), ceil_mode=(False, True)),
            *product(
                padding=(0, 1),
                kernel_size=(3,),
                count_include_pad=(False, True),
                divisor_override=(None, 2),
            ),
            *((2,), (2, 1), (3, {"divisor_override": 0}), (0,), (2, 0), (2, 1, -1), (2, 1, 2)),
        ),
        ("float64", "float32", "strided"),
    ),
    Signature(
        ("adaptive_avg_pool2d",),
        (((2, 3, 5, 6),), ((3, 5, 6),), ((0, 3, 5, 6),), ((5, 6),)),
        tuple((size,) for size in (1, 2, (3, 5), (None, 2), (7, 7), 0, -1, (1, 2, 3))),
        ("float64", "float32", "int64", "strided"),
    ),
    Signature(
        ("interpolate",),
        (((1, 2, 3, 4),), ((1, 2, 4, 4),)),
        (
            *product(size=(2, (5, 7), (3, 4)), mode=("nearest", "bilinear")),
            *product(scale_factor=(2, 0.5, (1.5, 0.7)), mode=("nearest", "bilinear")),
            *product(
                size=((5, 7), 1),
                mode=("bilinear",),
                align_corners=(False, True),
                antialias=(False, True),
            ),
            *(({},), ({"size": 2, "scale_factor": 2.0},), ({"size": 0},), ({"size": 2, "mode": "other"},)),
        ),
        ("float64", "float32", "int64", "strided"),
    ),
)  # fmt: skip


def _batch_norms() -> Iterator[Call]:
    """Give batch_norm with running statistics, which each call moves: they are results too."""
    numbers = ((0.1, 1e-5), (1.0, 0.1))
    for options in itertools.product((False, True), (False, True), (False, True), numbers):
        for shape in ((2, 3, 2, 2), (4, 3), (2, 3, 5), (1, 3), (3,), (0, 3, 2)):
            inputs = (ordinary(shape, 0), ordinary((3,), 1), ordinary((3,), 2))

            def run(library: Any, x: Any, *vectors: Any, options: Any = options) -> Any:
                training, has_statistics, has_weights, (momentum, eps) = options
                statistics = [library.full((3,), value, dtype=x.dtype) for value in (0.25, 1.5)]
                if not has_statistics:
                    statistics = [None, None]
                weights = vectors if has_weights else (None, None)
                out = function(library, "batch_norm")(
                    x, *statistics, *weights, training=training, momentum=momentum, eps=eps
                )
                return [out, *(s for s in statistics if s is not None)]

            words = "{} training={} statistics={} weights={} {}".format(shape, *options)
            for kind, arrays in variations(inputs, ("float64", "float32", "strided")):
                yield Call("batch_norm", f"{words} {kind}", run, arrays)


# ---- the whole -----------------------------------------------------------------------------------


def _rows_of_the_table() -> Iterator[Call]:
    """Give the rows of tests/cases that PyTorch has, each on inputs of every kind."""
    from tests.cases import all_cases

    for case in all_cases():
        if not case.in_torch:
            continue

        def run(library: Any, *tensors: Any, case: Any = case) -> Any:
            if library.__name__ == "torch" and case.torch is not None:
                return case.torch(library, *tensors)
            return case.run(library, *tensors)

        for kind, arrays in variations(case.inputs):
            yield Call(case.name, f"row {case.note} {kind}", run, arrays)


def all_calls() -> dict[str, list[Call]]:
    """Return the calls of each operation."""
    signatures = (*ELEMENTWISE, *REDUCTIONS, *SHAPES, *JOINING, *INDEXING, *PRODUCTS, *NETWORKS)
    families = [calls_of(signature) for signature in signatures]
    families += [_operators(), _mixed_dtypes(), _indexed(), _brackets(), _einsums(), _batch_norms()]
    calls: dict[str, list[Call]] = {}
    for call in itertools.chain(_rows_of_the_table(), *families):
        calls.setdefault(call.operation, []).append(call)
    return calls
