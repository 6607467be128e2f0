"""Where gradengine and PyTorch part, and why: every place that the comparison finds is listed here."""

from __future__ import annotations

import re
from typing import NamedTuple


class Difference(NamedTuple):
    """One way in which some operations differ; `words` and `calls` are regular expressions."""

    operations: str  # names, divided by spaces
    words: str  # what `comparison` says of the call
    reason: str
    calls: str = ""  # the notes of the calls, where not any

    def explains(self, operation: str, note: str, words: str) -> bool:
        """Whether this is why a call of an operation differs."""
        return (
            operation in self.operations.split()
            and re.search(self.words, words) is not None
            and re.search(self.calls, note) is not None
        )


GRADIENT = r"^(first|recorded|second) derivative by input \d"
ALONE = "^refused by PyTorch alone: "
OURS_ALONE = "^refused by gradengine alone: "
NUMBER = r"(-?0\.0|-?1\.0|some)"

# ---- what PyTorch has no code for ----------------------------------------------------------------

MISSING = [
    Difference(
        "abs absolute adaptive_avg_pool2d binary_cross_entropy_with_logits bmm ceil clamp cumsum div divide "
        "dot einsum elu floor floor_divide gelu huber_loss interpolate leaky_relu linear logsigmoid matmul "
        "mm mse_loss mv pad pow remainder round silu smooth_l1_loss softplus trunc",
        ALONE + r"NotImplementedError: .*not implemented for",
        "PyTorch has no kernel for this dtype; gradengine computes it as it does any other.",
    ),
    Difference(
        "div divide floor_divide remainder",
        "^refused as RuntimeError, by PyTorch as NotImplementedError",
        "PyTorch has no kernel for bool; gradengine has one, and refuses a division by False.",
        "bool",
    ),
    Difference(
        "argmax argmin relu topk",
        ALONE + r"RuntimeError: .*(does not|not) support(ed)? ",
        "PyTorch has no kernel for bool.",
    ),
    Difference(
        "pad",
        ALONE + r"NotImplementedError: Padding size \d is not supported for",
        "PyTorch's borders that are not constant are for the last dims of 2-D to 5-D tensors only.",
    ),
    Difference(
        "pad",
        ALONE + r"RuntimeError: Expected 2D or 3D",
        "The borders of an empty batch are empty.",
    ),
    Difference(
        "take_along_dim",
        ALONE + r"RuntimeError: view size is not compatible",
        "PyTorch cannot take from strided memory without dim, since it asks for a view.",
        "strided|expanded",
    ),
    Difference(
        "logsumexp",
        ALONE + r"RuntimeError: output with shape \[\] doesn't match the broadcast shape",
        "dim=() is all dims, as in sum; PyTorch's logsumexp mixes both meanings.",
        r"\(\);",
    ),
]

# ---- what one of them refuses --------------------------------------------------------------------

REFUSED = [
    Difference(
        "amax amin argmax argmin max min",
        r"^refused as ValueError, by PyTorch as IndexError: .*Expected reduction dim",
        "No dim is out of range: it is the sizes that are wrong, which is a ValueError.",
    ),
    Difference(
        "avg_pool2d batch_norm index_select movedim stack",
        "^refused as ValueError, by PyTorch as IndexError: ",
        "Wrong shapes, ranks and numbers of dims are ValueErrors; PyTorch meets them when it looks for a dim "
        "that is not there.",
    ),
    Difference(
        "log_softmax softmax",
        "^refused as TypeError, by PyTorch as IndexError: ",
        "Two mistakes in one call: integers, and a dim out of range.",
    ),
    Difference(
        "nll_loss",
        r"^refused as \w+, by PyTorch as (ValueError|IndexError): ",
        "Two mistakes in one call, of which PyTorch looks for the other one first.",
    ),
    Difference(
        "true_divide",
        r"unexpected keyword argument 'rounding_mode'",
        "true_divide is another name for div, with its options.",
    ),
    Difference(
        "sub l1_loss",
        ALONE + "RuntimeError: Subtraction, the `-` operator, with",
        "A bool beside numbers counts as 0 or 1 in subtraction too, as it does in addition.",
    ),
    Difference(
        "add sub",
        ALONE + "RuntimeError: Boolean alpha only supported",
        "alpha=True is 1, as True is in Python.",
    ),
    Difference(
        "add",
        "^value of dtype int64, in PyTorch bool",
        "alpha=2 times True is 2; PyTorch makes alpha a bool.",
        r"alpha=\S+ bool",
    ),
    Difference(
        "cross_entropy nll_loss",
        ALONE + "RuntimeError: expected target dtype to be Long or Byte",
        "Class numbers may be of any integer dtype.",
    ),
    Difference(
        "one_hot take",
        ALONE + "RuntimeError: .*(LongTensor|Expected a long tensor)",
        "Indices may be of any integer dtype.",
    ),
    Difference(
        "cumsum prod sum",
        ALONE + "RuntimeError: Autograd not support dtype",
        "With dtype= of integers the conversion takes x off the tape; PyTorch refuses x if it requires grad.",
    ),
    Difference(
        "binary_cross_entropy_with_logits",
        ALONE
        + "RuntimeError: The function .* is not differentiable with respect to argument 'weight'",
        "weight has a derivative, and gradengine finds it.",
    ),
    Difference(
        "setitem",
        ALONE + "RuntimeError: masked_fill_ only supports boolean masks",
        "An index of uint8 holds places, as any other integers do; PyTorch takes it for a mask of old.",
    ),
    Difference(
        "getitem setitem",
        "^(value|first derivative|recorded derivative|second derivative)",
        "An index of uint8 holds places, as any other integers do; PyTorch takes it for a mask of old.",
        "^uint8 ",
    ),
    Difference(
        "huber_loss",
        ALONE + "RuntimeError: result type .* can't be cast",
        "Inputs of two dtypes are promoted, as in the other losses.",
    ),
    Difference(
        "huber_loss l1_loss mse_loss",
        "^value of dtype float(32|64), in PyTorch float(32|64)",
        "PyTorch promotes 0-d tensors here, and huber_loss nothing; gradengine does what a - b does.",
        "float32, float64|float64, float32",
    ),
    Difference(
        "masked_fill pad",
        ALONE + "RuntimeError: value cannot be converted to type uint8_t without overflow",
        "A value between -1 and 0 becomes 0 in uint8, as it does in any conversion.",
        "uint8",
    ),
    Difference(
        "hardtanh",
        ALONE + "RuntimeError: cannot do hardtanh on an unsigned type with negative limits",
        "A bound below every value confines nothing.",
    ),
    Difference(
        "add bitwise_and bitwise_or bitwise_xor floor_divide index_add mul pow remainder sub",
        OURS_ALONE + ".*a number must fit into the tensor's dtype",
        "PyTorch lets a negative number wrap around in uint8 without a word.",
        "uint8",
    ),
    Difference(
        "batch_norm",
        "^refused as OverflowError, by PyTorch as RuntimeError",
        "It is NumPy that refuses negative numbers in uint8, where the row makes its running statistics.",
        "uint8",
    ),
    Difference(
        "ge gt le lt",
        "^value: (True for False|False for True)",
        "A number is compared as it is; PyTorch lets it wrap around in uint8 first.",
        "uint8",
    ),
    Difference(
        "clamp clip",
        "^value: ",
        "A bound that uint8 does not reach confines nothing; PyTorch lets it wrap around or cuts it.",
        "uint8$",
    ),
    Difference(
        "dropout log_softmax softmax",
        OURS_ALONE + ".*must be floating point",
        "PyTorch takes integers where it has nothing to compute: p=0, no training, or no elements.",
    ),
    Difference(
        "avg_pool2d conv1d conv2d max_pool2d",
        OURS_ALONE + "TypeError.*arrays must be of one dtype",
        "Networks compute with floats: these kernels are for no other dtype.",
        r"(int64|int32|uint8|bool)$",
    ),
    Difference(
        "interpolate",
        OURS_ALONE + ".*bilinear needs floating point",
        "Bytes are converted by hand before they are resized: how they are rounded is in plain sight.",
    ),
    Difference(
        "adaptive_avg_pool2d",
        OURS_ALONE + ".*output_size one or two positive ints",
        "An output without pixels is a mistake.",
    ),
    Difference(
        "index_add",
        OURS_ALONE + ".*alpha must be an integer beside integers",
        "As in add; PyTorch's index_add cuts the fraction.",
    ),
    Difference(
        "batch_norm",
        OURS_ALONE + ".*running_mean must be given unless training",
        "Of an empty batch too.",
        r"^\(0, 3, 2\)",
    ),
    Difference(
        "conv2d",
        OURS_ALONE + ".*dilation must be positive",
        "Of an empty batch too.",
        r"^\(0,4,5,6\)",
    ),
    Difference(
        "linear",
        OURS_ALONE + ".*a 2-D weight",
        "A weight without output features: say mv or matmul.",
    ),
    Difference(
        "roll",
        OURS_ALONE + ".*dim must be in",
        "An empty tensor has no more dims than another one.",
        r"^\(0,3\)",
    ),
    Difference(
        "take_along_dim",
        OURS_ALONE + ".*out of bounds",
        "PyTorch takes an index that is too large modulo the size.",
    ),
    Difference(
        "pow",
        OURS_ALONE + ".*negative integer powers",
        "1 / 2 is no integer; PyTorch gives 0 for it if the exponent is a tensor.",
    ),
]

# ---- other results -------------------------------------------------------------------------------

RESULTS = [
    Difference(
        "all any",
        "^value of dtype bool, in PyTorch uint8",
        "The answer is a bool; PyTorch keeps uint8 from the time before it had bools.",
    ),
    Difference(
        "all any",
        r"^value of shape .* in PyTorch",
        "dim=() is all dims, as in sum; in PyTorch it is none, for all and any.",
        r" \(\); ",
    ),
    Difference(
        "einsum",
        "^value of dtype (bool|int32|uint8), in PyTorch int64",
        "The dtype is that of the operands; PyTorch's is another where it sums without a product.",
    ),
    Difference(
        "square",
        "^value of dtype bool, in PyTorch int64",
        "square is x * x.",
    ),
    Difference(
        "pow",
        "^value of dtype int64, in PyTorch bool",
        "True as an exponent is 1: the dtype does not depend on which of the two is written.",
        "True bool",
    ),
    Difference(
        "topk",
        r"^value of shape \(0,\), in PyTorch \(\)",
        "No element of a number is no element; PyTorch returns one.",
        r"^\(\) k=0",
    ),
    Difference(
        "topk",
        "^(value|first derivative|recorded derivative)",
        "Of equal elements the first one counts; PyTorch does not say which.",
    ),
    Difference(
        "sign",
        "^value: nan for 0.0",
        "The sign of nan is nan.",
        "edges",
    ),
    Difference(
        "adaptive_avg_pool2d amin clamp clip cumsum einsum elu gelu layer_norm max maximum min minimum relu "
        "remainder",
        r"^value: (-?0\.0 for -?0\.0(, )?)+$",
        "The sign of a zero: PyTorch's sums start from 0.0, which a -0.0 does not change, and its "
        "comparisons take either zero.",
    ),
    Difference(
        "interpolate",
        "^value: ",
        "nan and inf spread to pixels that a weight of 0 multiplies: how far, the order of sums decides.",
        "edges",
    ),
]

# ---- derivatives at nan, at inf and at kinks -----------------------------------------------------

DERIVATIVES = [
    Difference(
        "abs absolute elu l1_loss norm smooth_l1_loss",
        GRADIENT + ": nan for ",
        "The derivative at nan is nan; PyTorch's sign(nan) is 0, and its elu passes the gradient on.",
        "edges",
    ),
    Difference(
        "hardtanh relu6",
        GRADIENT + f": ({NUMBER} for 0.0(, )?)+$",
        "nan passes its gradient on; in PyTorch the element's place in memory decides.",
        "edges",
    ),
    Difference(
        "clamp",
        GRADIENT + f": ({NUMBER} for {NUMBER}(, )?)+$",
        "Between bounds that are tensors nan keeps its gradient, and a bound that is nan takes it.",
        "edges",
    ),
    Difference(
        "amax amin",
        GRADIENT + ": .* for nan",
        "The nans that make a result nan share its gradient, as in max; in PyTorch's amax they get nan.",
        "edges",
    ),
    Difference(
        "elu softplus",
        "^second derivative by input 0: (nan for 0.0, )?some for -?0.0",
        "Where the two branches meet the second derivative is that of the curved one.",
    ),
    Difference(
        "huber_loss smooth_l1_loss",
        r"^second derivative by input \d: (some for -?0\.0(, )?)+$",
        "The derivative is hardtanh, which passes the gradient on at nan.",
        "edges",
    ),
    Difference(
        "norm",
        "^second derivative by input 0: 0.0 for nan",
        "At 0 all derivatives are 0.",
    ),
    Difference(
        "std var",
        GRADIENT + ": .*(nan|inf) for|" + GRADIENT + ": .* for (nan|inf|-inf)",
        "nan and inf in the input, or no degrees of freedom: both make nan and inf, in other places.",
        r"edges|correction|^\(\) ",
    ),
    Difference(
        "binary_cross_entropy_with_logits pow prod remainder",
        GRADIENT + ": .*(nan|inf) for|" + GRADIENT + ": .* for (nan|inf|-inf)",
        "inf * 0 and inf - inf in formulas that are the same for numbers.",
        "edges|ties|0 on the left",
    ),
]

DIFFERENCES = [*MISSING, *REFUSED, *RESULTS, *DERIVATIVES]
