"""gradengine: reverse-mode automatic differentiation on CuPy arrays, with NumPy as the fallback."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gradengine import autograd, functional
from gradengine.autocast_mode import autocast, is_autocast_enabled
from gradengine.autograd import enable_grad, is_grad_enabled, no_grad, set_grad_enabled
from gradengine.devices import (
    Device,
    cuda_is_available,
    default_device,
    device,
    set_default_device,
    synchronize,
)
from gradengine.dtypes import bool_ as bool
from gradengine.dtypes import (
    float16,
    float32,
    float64,
    get_default_dtype,
    int8,
    int16,
    int32,
    int64,
    result_type,
    set_default_dtype,
    uint8,
)
from gradengine.factories import (
    arange,
    as_tensor,
    asarray,
    empty,
    empty_like,
    eye,
    from_dlpack,
    from_numpy,
    full,
    full_like,
    linspace,
    ones,
    ones_like,
    rand,
    rand_like,
    randint,
    randn,
    randn_like,
    randperm,
    tensor,
    zeros,
    zeros_like,
)
from gradengine.functional import *
from gradengine.kernels.cpu.threads import get_num_threads, set_num_threads
from gradengine.random import (
    Generator,
    default_generator,
    get_rng_state,
    initial_seed,
    manual_seed,
    seed,
    set_rng_state,
)
from gradengine.tensor import Parameter, Tensor, is_tensor

half, double = float16, float64
short, int, long = int16, int32, int64
float = float32  # last: above, these names are Python's

if TYPE_CHECKING:
    from gradengine import amp, backends, cuda, data, func, models, nn, optim, weights
    from gradengine.backends import (
        are_deterministic_algorithms_enabled,
        get_float32_matmul_precision,
        set_float32_matmul_precision,
        use_deterministic,
        use_deterministic_algorithms,
    )
    from gradengine.dtypes import bfloat16
    from gradengine.weights import load, save

__version__ = "0.1.0"

# Imported when first asked for: a user of tensors alone does not pay for them.
_LAZY = {"bfloat16": "dtypes", "load": "weights", "save": "weights"}
_LAZY |= {f"{verb}_float32_matmul_precision": "backends" for verb in ("get", "set")}
_LAZY |= dict.fromkeys(
    (
        *("use_deterministic", "use_deterministic_algorithms"),
        "are_deterministic_algorithms_enabled",
    ),
    "backends",
)
_LAZY |= dict.fromkeys(
    ("amp", "backends", "cuda", "data", "func", "models", "nn", "optim", "weights"), ""
)


def __getattr__(name: str) -> Any:
    home = _LAZY.get(name)
    if home is None:
        raise AttributeError(f"module 'gradengine' has no attribute {name!r}")
    module = importlib.import_module(f"gradengine.{home or name}")
    return getattr(module, name) if home else module
