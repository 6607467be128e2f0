"""The operations under their public names, which are PyTorch's."""

from gradengine.ops.activation import (
    dropout,
    elu,
    gelu,
    hardtanh,
    leaky_relu,
    log_softmax,
    logsigmoid,
    relu,
    relu6,
    silu,
    softmax,
    softplus,
)
from gradengine.ops.comparison import (
    allclose,
    bitwise_and,
    bitwise_not,
    bitwise_or,
    bitwise_xor,
    eq,
    equal,
    ge,
    gt,
    isclose,
    isfinite,
    isinf,
    isnan,
    le,
    logical_and,
    logical_not,
    logical_or,
    logical_xor,
    lt,
    ne,
)
from gradengine.ops.convolution import conv1d, conv2d
from gradengine.ops.elementwise import (
    abs,
    ceil,
    clamp,
    cos,
    erf,
    exp,
    expm1,
    floor,
    floor_divide,
    log,
    log1p,
    log2,
    log10,
    maximum,
    minimum,
    mul,
    neg,
    pow,
    reciprocal,
    remainder,
    round,
    rsqrt,
    sigmoid,
    sign,
    sin,
    sqrt,
    square,
    tan,
    tanh,
    trunc,
    where,
)
from gradengine.ops.elementwise import rounded_div as div
from gradengine.ops.elementwise import scaled_add as add
from gradengine.ops.elementwise import scaled_sub as sub
from gradengine.ops.indexing import (
    gather,
    index_add,
    index_select,
    masked_fill,
    masked_select,
    nonzero,
    one_hot,
    scatter,
    scatter_add,
    take,
    take_along_dim,
)
from gradengine.ops.interpolation import interpolate
from gradengine.ops.joining import cat, chunk, hstack, narrow, split, stack, unbind, vstack
from gradengine.ops.loss import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    huber_loss,
    l1_loss,
    mse_loss,
    nll_loss,
    smooth_l1_loss,
)
from gradengine.ops.matmul import bmm, dot, einsum, linear, matmul, mm, mv, outer
from gradengine.ops.normalization import batch_norm, layer_norm
from gradengine.ops.padding import pad
from gradengine.ops.pooling import adaptive_avg_pool2d, avg_pool2d, max_pool2d
from gradengine.ops.reduction import (
    all,
    amax,
    amin,
    any,
    argmax,
    argmin,
    count_nonzero,
    cumsum,
    logsumexp,
    max,
    mean,
    min,
    norm,
    prod,
    std,
    sum,
    var,
)
from gradengine.ops.shape import (
    broadcast_tensors,
    broadcast_to,
    clone,
    diag,
    diagonal,
    expand,
    flatten,
    flip,
    meshgrid,
    movedim,
    permute,
    ravel,
    repeat,
    reshape,
    roll,
    squeeze,
    t,
    tile,
    transpose,
    tril,
    triu,
    unflatten,
    unsqueeze,
    view,
)
from gradengine.ops.sorting import argsort, sort, topk

absolute = abs
clip = clamp
concat = concatenate = cat
divide = true_divide = div
multiply = mul
negative = neg
subtract = sub
swapaxes = transpose
