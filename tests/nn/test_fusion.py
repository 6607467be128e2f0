"""conv_norm beside the modules called one after the other, and what it keeps between calls."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine import functional as F
from gradengine import kernels, nn, optim
from gradengine.kernels import settings
from gradengine.nn import fusion

SIZES = [
    {"kernel_size": 3, "padding": 1, "bias": False},
    {"kernel_size": 1, "bias": True},
    {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2, "bias": True},
    {"kernel_size": (3, 2), "padding": "same", "dilation": (1, 2), "bias": False},
]
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}


def make(seed: int = 0, affine: bool = True, dtype: Any = "float64", **sizes: Any) -> Any:
    """Return a convolution of 4 to 6 channels and a norm, with values far from the initial ones."""
    sizes = sizes or SIZES[0]
    conv = nn.Conv2d(4, 6, **sizes, dtype=dtype)
    norm = nn.BatchNorm2d(6, affine=affine, dtype=dtype)
    generator = np.random.default_rng(seed)
    with ge.no_grad():
        norm.running_mean.copy_(generator.normal(size=6))
        norm.running_var.copy_(generator.uniform(0.5, 2, 6))
        if affine:
            norm.weight.copy_(generator.uniform(0.5, 2, 6))
            norm.bias.copy_(generator.normal(size=6))
    return conv, norm


def images(*shape: int, seed: int = 1, dtype: Any = "float64") -> ge.Tensor:
    return ge.tensor(np.random.default_rng(seed).normal(size=shape), dtype=dtype)


def one_by_one(
    x: ge.Tensor, conv: Any, norm: Any, activation: Any = None, residual: Any = None
) -> ge.Tensor:
    out = norm(conv(x))
    out = out if residual is None else out + residual
    return out if activation is None else activation(out)


def agree(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    found, expected = (x.detach().array for x in (found, expected))
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=10 * tolerance)


def run(function: Any, modules: Any, given: Any, **options: Any) -> dict[str, ge.Tensor]:
    """Return result, gradients and buffers of one call, by name."""
    conv, norm = modules
    x, residual = given
    if residual is not None:
        options["residual"] = residual
    out = function(x, conv, norm, **options)
    named = {"x": x, "residual": residual}
    named |= {f"conv.{name}": p for name, p in conv.named_parameters()}
    named |= {f"norm.{name}": p for name, p in norm.named_parameters()}
    if out.requires_grad:
        weights = np.cos(np.arange(out.numel())).reshape(out.shape)
        out.backward(ge.tensor(weights, dtype=out.dtype))
    found = {name: p.grad for name, p in named.items() if p is not None and p.grad is not None}
    return found | {"out": out} | dict(norm.named_buffers())


# ---- the same as one by one ----------------------------------------------------------------------


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_relu", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval", "freeze", "no_grad eval", "no_grad train"])
@pytest.mark.parametrize("sizes", SIZES, ids=range(len(SIZES)))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_results_gradients_and_statistics(dtype, sizes, mode, with_relu, with_residual):
    modules = make(dtype=dtype, **sizes)
    for module in modules:
        module.train("eval" not in mode)
        if mode == "freeze":
            module.freeze()
    twins = copy.deepcopy(modules)
    x = images(3, 4, 7, 6, dtype=dtype)
    shape = modules[0](x).shape
    residual = images(*shape, seed=2, dtype=dtype) if with_residual else None
    activation = nn.ReLU() if with_relu else None
    found, expected = {}, {}
    with ge.set_grad_enabled("no_grad" not in mode):
        for _ in range(2):  # the second time, of what was kept
            found = run(nn.conv_norm, modules, (x, residual), activation=activation)
            expected = run(one_by_one, twins, (x, residual), activation=activation)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        agree(found[name], tensor, TOLERANCE[dtype])


FROZEN = ["conv.weight", "conv.bias", "norm.weight", "norm.bias"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [[], *([name] for name in FROZEN), FROZEN[:2], FROZEN[2:]])
def test_frozen_subsets(frozen, training):
    modules = make(**SIZES[1])
    for name in frozen:
        module, _, parameter = name.partition(".")
        modules[module == "norm"].get_parameter(parameter).requires_grad = False
    modules[1].train(training)
    modules[1]._warned = True  # of statistics that move
    twins = copy.deepcopy(modules)
    given = [images(3, 4, 5, 5).requires_grad_(), images(3, 6, 5, 5, seed=2).requires_grad_()]
    expected = run(one_by_one, twins, copy.deepcopy(given), activation=nn.ReLU())
    found = run(nn.conv_norm, modules, given, activation=nn.ReLU())
    assert found.keys() == expected.keys()
    assert not set(found) & set(frozen)
    for name, tensor in expected.items():
        agree(found[name], tensor)


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives(training):
    conv, norm = make(**SIZES[2])
    norm.train(training)
    residual = images(2, 6, 3, 3, seed=2).requires_grad_()
    leaves = [images(2, 4, 5, 5).requires_grad_(), residual, conv.weight, norm.weight, norm.bias]
    found = []
    for function in (nn.conv_norm, one_by_one):
        out = function(leaves[0], conv, norm, activation=nn.ReLU(), residual=residual)
        first = ge.autograd.grad((out * out).sum(), leaves, create_graph=True)
        second = sum((gradient * gradient).sum() for gradient in first)
        found.append((*first, *ge.autograd.grad(second, leaves)))
    for fused, expected in zip(*found, strict=True):
        agree(fused, expected, 1e-10)


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("options", [{"affine": False}, {"momentum": None}, {"track": False}])
def test_other_norms(options, mode):
    conv, norm = make(affine=options.get("affine", True))
    if "momentum" in options:
        norm.momentum = None
    if "track" in options:
        norm = nn.BatchNorm2d(6, track_running_stats=False, dtype="float64")
    norm.train(mode == "train")
    twins = copy.deepcopy((conv, norm))
    found, expected = {}, {}
    with ge.set_grad_enabled(mode != "no_grad"):
        for seed in range(3):
            x = images(3, 4, 5, 5, seed=seed)
            found = run(nn.conv_norm, (conv, norm), (x, None), activation=nn.ReLU())
            expected = run(one_by_one, twins, (x, None), activation=nn.ReLU())
    for name, tensor in expected.items():
        agree(found[name], tensor)


@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 5), (3, 1, 5, 5)])
@pytest.mark.parametrize("training", [True, False])
def test_a_residual_that_broadcasts(training, shape):
    conv, norm = make()
    norm.train(training)
    twins = copy.deepcopy((conv, norm))
    x, residual = images(3, 4, 5, 5), images(*shape, seed=2)
    with ge.no_grad():
        found = nn.conv_norm(x, conv, norm, activation=nn.ReLU(), residual=residual)
        agree(found, one_by_one(x, *twins, nn.ReLU(), residual))


@pytest.mark.parametrize("training", [True, False])
def test_a_residual_of_another_dtype(training):
    conv, norm = make(dtype="float32")
    norm.train(training)
    twins = copy.deepcopy((conv, norm))
    x, residual = images(3, 4, 5, 5, dtype="float32"), images(3, 6, 5, 5, seed=2)
    with ge.no_grad():
        found = nn.conv_norm(x, conv, norm, activation=nn.ReLU(), residual=residual)
        expected = one_by_one(x, *twins, nn.ReLU(), residual)
    assert found.dtype == "float64"
    agree(found, expected, 1e-5)


@pytest.mark.parametrize("activation", [nn.Tanh(), F.relu, None])
def test_other_activations(activation):
    conv, norm = make()
    norm.eval()
    x, residual = images(2, 4, 5, 5), images(2, 6, 5, 5, seed=2)
    with ge.no_grad():
        found = nn.conv_norm(x, conv, norm, activation=activation, residual=residual)
        agree(found, one_by_one(x, conv, norm, activation, residual))


def test_nan_stays_nan():
    conv, norm = make()
    norm.eval()
    x = images(1, 4, 5, 5)
    x[0, 0, 2, 2] = float("nan")
    with ge.no_grad():
        out = nn.conv_norm(x, conv, norm, activation=nn.ReLU())
    assert np.isnan(out.array[0, :, 1:4, 1:4]).all()


def test_an_empty_batch():
    conv, norm = make()
    norm.eval()
    with ge.no_grad():
        assert nn.conv_norm(images(0, 4, 5, 5), conv, norm).shape == (0, 6, 5, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False])
def test_on_a_gpu(training):
    conv, norm = (module.train(training) for module in make(dtype="float32"))
    x, residual = images(2, 4, 5, 5, dtype="float32"), images(2, 6, 5, 5, seed=2, dtype="float32")
    with ge.no_grad():
        expected = one_by_one(x, *copy.deepcopy((conv, norm)), nn.ReLU(), residual)
        conv.cuda()
        norm.cuda()
        x, residual = x.cuda(), residual.cuda()
        for _ in range(1 if training else 2):
            found = nn.conv_norm(x, conv, norm, activation=nn.ReLU(), residual=residual)
            np.testing.assert_allclose(found.cpu().array, expected.array, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("winograd", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_in_either_form_of_the_convolution(monkeypatch, training, winograd):
    monkeypatch.setattr(settings.cpu, "winograd", winograd)
    conv, norm = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32).train(training)
    with ge.no_grad():
        norm.running_var.uniform_(0.01, 0.1)
        norm.weight.normal_()
    x, residual = (images(8, 32, 9, 8, seed=seed, dtype="float32") for seed in (1, 2))
    exact = copy.deepcopy((conv, norm))
    for module in exact:
        module.double()
    with ge.no_grad():
        found = nn.conv_norm(x, conv, norm, activation=nn.ReLU(), residual=residual)
        expected = one_by_one(x.double(), *exact, nn.ReLU(), residual.double())
    assert abs(found.array - expected.array).max() < 3e-5 * abs(expected.array).max()
    for ours, theirs in zip(norm.buffers(), exact[1].buffers(), strict=True):
        np.testing.assert_allclose(ours.array, theirs.array, rtol=1e-4, atol=1e-6)


def then_pooled(pool: Any) -> Any:
    """Return one_by_one with a pool at the end, called as conv_norm is."""

    def function(x: Any, conv: Any, norm: Any, **options: Any) -> Any:
        options.pop("pool")
        return pool(one_by_one(x, conv, norm, **options))

    return function


POOLS = [nn.MaxPool2d(3, stride=2, padding=1), nn.MaxPool2d(2, ceil_mode=True)]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("with_relu", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "freeze", "no_grad eval", "no_grad train"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_pool_at_the_end(dtype, mode, with_relu, pool):
    modules = make(dtype=dtype)
    for module in modules:
        module.train("eval" not in mode)
        if mode == "freeze":
            module.freeze()
    twins = copy.deepcopy(modules)
    x = images(3, 4, 9, 8, dtype=dtype)
    options = {"activation": nn.ReLU() if with_relu else None, "pool": pool}
    with ge.set_grad_enabled("no_grad" not in mode):
        found = run(nn.conv_norm, modules, (x, None), **options)
        expected = run(then_pooled(pool), twins, (x, None), **options)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        agree(found[name], tensor, TOLERANCE[dtype])


def test_second_derivatives_through_a_pool():
    conv, norm = make(**SIZES[2])
    leaves = [images(2, 4, 9, 9).requires_grad_(), conv.weight, norm.weight, norm.bias]
    found = []
    for function in (nn.conv_norm, then_pooled(POOLS[0])):
        out = function(leaves[0], conv, norm, activation=nn.ReLU(), pool=POOLS[0])
        first = ge.autograd.grad((out * out).sum(), leaves, create_graph=True)
        second = sum((gradient * gradient).sum() for gradient in first)
        found.append((*first, *ge.autograd.grad(second, leaves)))
    for fused, expected in zip(*found, strict=True):
        agree(fused, expected, 1e-10)


@pytest.mark.parametrize("other", ["residual", "hook", "indices", "norm"])
def test_what_a_pool_may_not_skip(other):
    conv, norm = make()
    pool, options = nn.MaxPool2d(3, stride=2, padding=1), {}
    called = []
    if other == "residual":
        options["residual"] = images(3, 6, 9, 8, seed=2)
    elif other == "hook":
        pool.register_forward_hook(lambda *arguments: called.append(arguments[1][0].shape))
    elif other == "indices":
        pool.return_indices = True
    else:
        norm = nn.Identity()
    twins = copy.deepcopy((conv, norm))
    x = images(3, 4, 9, 8)
    found = nn.conv_norm(x, conv, norm, activation=nn.ReLU(), pool=pool, **options)
    hooked = list(called)
    expected = pool(one_by_one(x, *twins, nn.ReLU(), **options))
    assert hooked == ([(3, 6, 9, 8)] if other == "hook" else [])
    if other == "indices":
        for one, two in zip(found, expected, strict=True):
            agree(one, two)
    else:
        agree(found, expected)


def test_an_image_without_a_batch_is_pooled():
    conv, norm, pool = nn.Conv2d(4, 6, 3), nn.Identity(), nn.MaxPool2d(2)
    x = images(4, 9, 8, dtype="float32")
    found = nn.conv_norm(x, conv, norm, activation=nn.ReLU(), pool=pool)
    agree(found, pool(one_by_one(x, conv, norm, nn.ReLU())))


# ---- the graph -----------------------------------------------------------------------------------


def test_the_node_of_a_pool():
    conv, norm = make()
    x = images(2, 4, 5, 5).requires_grad_()
    out = nn.conv_norm(x, conv, norm, activation=nn.ReLU(), pool=POOLS[0])
    assert out.grad_fn.name() == "BatchNormReluMaxPoolBackward0"
    assert [node.name() for node, _ in out.grad_fn.next_functions] == [
        *("ConvolutionBackward0", "AccumulateGrad", "AccumulateGrad")
    ]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("activation", "label"),
    [(None, "NativeBatchNormBackward0"), (nn.ReLU(), "BatchNormReluBackward0")],
)
def test_nodes(activation, label, training):
    conv, norm = make(**SIZES[1])
    norm.train(training)
    residual = images(2, 6, 5, 5).requires_grad_()
    out = nn.conv_norm(images(2, 4, 5, 5), conv, norm, activation=activation, residual=residual)
    assert out.grad_fn.name() == label
    parents = [node and node.name() for node, _ in out.grad_fn.next_functions]
    assert parents == ["ConvolutionBackward0", *["AccumulateGrad"] * 3]
    convolution = out.grad_fn.next_functions[0][0]
    assert [node and node.name() for node, _ in convolution.next_functions] == [
        *(None, "AccumulateGrad", "AccumulateGrad")
    ]


def test_what_needs_no_gradient_records_nothing():
    conv, norm = make()
    conv.freeze()
    norm.freeze()
    x = images(2, 4, 5, 5)
    assert nn.conv_norm(x, conv, norm, activation=nn.ReLU()).grad_fn is None
    residual = images(2, 6, 5, 5).requires_grad_()
    nn.conv_norm(x, conv, norm, residual=residual).sum().backward()
    assert (residual.grad.array == 1).all()
    assert nn.conv_norm(x.requires_grad_(), conv, norm).grad_fn is not None


# ---- what is called as usual ---------------------------------------------------------------------


def doubled(module: Any, args: Any, output: Any) -> Any:
    return output * 2


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_forward_hooks_are_called(place, training):
    modules = [*make(), nn.ReLU()]
    modules[1].train(training)
    twins = copy.deepcopy(modules)
    seen = []
    for module in (modules[place], twins[place]):
        module.register_forward_pre_hook(lambda module, args: seen.append(type(module)))
        module.register_forward_hook(doubled)
    x, residual = images(2, 4, 5, 5), images(2, 6, 5, 5, seed=2)
    with ge.no_grad():
        found, expected = (
            function(x, conv, norm, activation=activation, residual=residual)
            for function, (conv, norm, activation) in (
                (nn.conv_norm, modules),
                (one_by_one, twins),
            )
        )
    agree(found, expected)
    assert seen == [type(modules[place])] * 2


@pytest.mark.parametrize("place", [0, 1, 2])
def test_backward_hooks_are_called(place):
    modules = [*make(), nn.ReLU()]
    twins = copy.deepcopy(modules)
    x = images(2, 4, 5, 5).requires_grad_()
    found: list[Any] = []
    for function, given in ((nn.conv_norm, modules), (one_by_one, twins)):
        given[place].register_full_backward_hook(
            lambda module, grad_input, grad_output: found.append((grad_input[0], grad_output[0]))
        )
        function(x, *given[:2], activation=given[2]).sum().backward()
    assert len(found) == 2
    for fused, expected in zip(*found, strict=True):
        agree(fused, expected, 1e-10)


@pytest.mark.parametrize("place", [0, 1])
def test_subclasses_are_called(place):
    modules = list(make())

    class Doubled(type(modules[place])):
        def forward(self, x):
            return super().forward(x) * 2

    twins = list(modules)
    modules[place].eval()
    modules[place].__class__ = Doubled
    with ge.no_grad():
        agree(nn.conv_norm(images(2, 4, 5, 5), *modules), one_by_one(images(2, 4, 5, 5), *twins))


def test_a_replaced_forward_is_called():
    conv, norm = make()
    norm.eval()
    conv.forward = lambda x: ge.zeros(1, 6, 2, 2, dtype="float64")
    with ge.no_grad():
        agree(nn.conv_norm(images(2, 4, 5, 5), conv, norm), norm(conv.forward(None)))


def test_a_weight_that_is_no_parameter():
    conv, norm = make()
    norm.eval()
    del conv.weight
    x = images(2, 4, 5, 5)
    for seed in range(2):
        conv.weight = images(6, 4, 3, 3, seed=seed)
        with ge.no_grad():
            agree(nn.conv_norm(x, conv, norm), one_by_one(x, conv, norm))


def test_an_image_without_batch_is_refused_as_usual():
    conv, norm = make()
    with pytest.raises(ValueError, match="BatchNorm2d: expected 4D input; got 3D input"):
        nn.conv_norm(images(4, 5, 5), conv, norm)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda conv, norm: (nn.Conv2d(5, 6, 3, dtype="float64"), norm),
        lambda conv, norm: (nn.Conv2d(4, 6, 9, dtype="float64"), norm),
        lambda conv, norm: (conv, nn.BatchNorm2d(7, dtype="float64")),
        lambda conv, norm: (conv, nn.BatchNorm2d(6, dtype="float32")),
        lambda conv, norm: (nn.Conv2d(4, 6, 3, dtype="float32"), norm),
        lambda conv, norm: (nn.Conv2d(4, 6, 5, dtype="float64"), norm),
    ],
)
def test_errors_are_the_modules_own(spoil, training, grad):
    conv, norm = spoil(*make())
    norm.train(training)
    x = images(1, 4, 5, 5)
    with ge.set_grad_enabled(grad):
        try:
            one_by_one(x, conv, norm)
        except (TypeError, ValueError) as error:
            expected = error
        else:
            nn.conv_norm(x, conv, norm)
            return
        with pytest.raises(type(expected)) as caught:
            nn.conv_norm(x, conv, norm)
    assert str(caught.value) == str(expected)


def test_another_dtype_is_refused_also_when_weights_are_kept():
    conv, norm = make()
    infer(conv, norm.eval())
    x = images(2, 4, 5, 5, dtype="float32")
    with ge.no_grad(), pytest.raises(TypeError, match=r"weight\.dtype=float64"):
        nn.conv_norm(x, conv, norm)


def test_statistics_that_are_gone():
    conv, norm = make()
    norm.eval()
    norm.running_mean = None
    with ge.no_grad(), pytest.raises(ValueError, match="running_mean must be given"):
        nn.conv_norm(images(1, 4, 5, 5), conv, norm)


def test_the_warning_of_moving_statistics_names_the_callers_line():
    conv, norm = make()
    norm.requires_grad_(False)
    with pytest.warns(UserWarning, match="still moves their running statistics") as caught:
        nn.conv_norm(images(2, 4, 5, 5), conv, norm)
    assert caught[0].filename == __file__


# ---- what is kept between calls ------------------------------------------------------------------


@pytest.fixture
def packed(monkeypatch):
    """Give the list of geometries for which a weight was packed."""
    geometries = []
    pack = kernels.pack_conv2d

    def counted(weight, geometry):
        geometries.append(geometry)
        return pack(weight, geometry)

    monkeypatch.setattr(kernels, "pack_conv2d", counted)
    return geometries


def infer(conv: Any, norm: Any, *shape: int) -> None:
    """Check that a call without gradients gives what the modules give."""
    x = images(*(shape or (2, 4, 5, 5)))
    x = x.to(conv.weight.dtype)
    with ge.no_grad():
        found = nn.conv_norm(x, conv, norm, activation=nn.ReLU())
        agree(found, one_by_one(x, conv, norm, nn.ReLU()), TOLERANCE[str(x.dtype)])


def test_the_weight_is_packed_once(packed):
    conv, norm = make()
    norm.eval()
    for batch in (2, 2, 1, 5):
        infer(conv, norm, batch, 4, 5, 5)
    assert len(packed) == 1


def step(conv: Any, norm: Any) -> None:
    optimizer = optim.SGD([conv.weight], lr=0.1)
    conv.weight.grad = conv.weight.detach().clone()
    optimizer.step()


def train(conv: Any, norm: Any) -> None:
    norm._warned = True  # of statistics that move
    with ge.no_grad():
        norm.train()(images(2, 6, 5, 5, seed=5))
    norm.eval()


def load(conv: Any, norm: Any, **options: Any) -> None:
    state = {name: tensor * 2 + 1 for name, tensor in norm.state_dict().items()}
    norm.load_state_dict(state, **options)


def in_no_grad(write: Any) -> Any:
    def change(conv: Any, norm: Any) -> None:
        with ge.no_grad():
            write(conv, norm)

    return change


def set_eps(conv: Any, norm: Any) -> None:
    norm.eps = 0.5


def set_padding(conv: Any, norm: Any) -> None:
    conv.padding = (0, 0)


def set_weight(conv: Any, norm: Any) -> None:
    conv.weight = nn.Parameter(images(6, 4, 3, 3, seed=9))


def set_data(conv: Any, norm: Any) -> None:
    conv.weight.data = images(6, 4, 3, 3, seed=9)


def set_array(conv: Any, norm: Any) -> None:
    conv.weight.array = images(6, 4, 3, 3, seed=9).array


def write_array(conv: Any, norm: Any) -> None:
    conv.weight.array[0] = 3
    conv.weight.written()


def write_item(conv: Any, norm: Any) -> None:
    norm.running_mean[2] = 7


CHANGES = {
    "optimizer step": step,
    "train": train,
    "load": load,
    "assign": lambda conv, norm: load(conv, norm, assign=True),
    "copy_": in_no_grad(lambda conv, norm: norm.running_var.copy_(norm.running_var * 2)),
    "+=": in_no_grad(lambda conv, norm: norm.weight.add_(1)),
    "detached": lambda conv, norm: norm.bias.detach().fill_(3),
    "data": lambda conv, norm: norm.weight.data.mul_(3),
    "view": in_no_grad(lambda conv, norm: conv.weight[0].zero_()),
    "init": lambda conv, norm: nn.init.ones_(conv.weight),
    "reset": lambda conv, norm: conv.reset_parameters(),
    "reset_running_stats": lambda conv, norm: norm.reset_running_stats(),
    "dtype": lambda conv, norm: (conv.float(), norm.float()),
    "bias": lambda conv, norm: conv.register_parameter("bias", nn.Parameter(images(6))),
    "no bias": lambda conv, norm: norm.register_parameter("bias", None),
    **{
        function.__name__: function
        for function in (set_eps, set_padding, set_weight, set_data, set_array)
    },
    **{function.__name__: function for function in (write_array, write_item)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("frozen", [False, True])
def test_every_change_is_noticed(packed, change, frozen):
    conv, norm = make()
    norm.eval()
    infer(conv, norm)
    if frozen:
        conv.requires_grad_(False)
        norm.requires_grad_(False)
    change(conv, norm)
    infer(conv, norm)
    infer(conv, norm)
    assert len(packed) == 2


def test_another_choice_of_kernels_is_noticed(packed, monkeypatch):
    conv, norm = make()
    norm.eval()
    for winograd in (True, True, False, False):
        monkeypatch.setattr(settings.cpu, "winograd", winograd)
        infer(conv, norm)
    assert len(packed) == 2


def test_a_step_of_training_frees_what_was_kept(packed):
    conv, norm = make()
    infer(conv, norm.eval())
    assert conv in fusion._KEPT
    nn.conv_norm(images(2, 4, 5, 5), conv, norm.train())
    assert conv not in fusion._KEPT


@pytest.mark.filterwarnings("ignore:BatchNorm. the parameters of these layers are frozen")
def test_a_frozen_convolution_before_a_batchs_statistics_is_packed_once(packed):
    conv, norm = make()
    x = images(2, 4, 5, 5)
    norm.reset_running_stats()
    expected = nn.conv_norm(x, conv, norm, activation=nn.ReLU())
    moved = norm.running_mean.numpy().copy()
    conv.requires_grad_(False)
    norm.requires_grad_(False)
    for _ in range(3):
        norm.reset_running_stats()
        found = nn.conv_norm(x, conv, norm, activation=nn.ReLU())
        assert found.grad_fn is None
        np.testing.assert_array_equal(found.numpy(), expected.detach().numpy())
        np.testing.assert_array_equal(norm.running_mean.numpy(), moved)
    assert len(packed) == 1
    with ge.no_grad():
        conv.weight.mul_(2)
    doubled = nn.conv_norm(x, conv, norm)
    assert len(packed) == 2
    np.testing.assert_allclose(doubled.numpy(), norm(conv(x)).numpy(), rtol=1e-12, atol=1e-12)
    nn.conv_norm(x, conv, norm.eval())
    assert len(packed) == 3


def test_a_gradient_by_the_input_alone_leaves_it(packed):
    conv, norm = make()
    conv.freeze()
    norm.freeze()
    infer(conv, norm)
    nn.conv_norm(images(2, 4, 5, 5).requires_grad_(), conv, norm).sum().backward()
    infer(conv, norm)
    assert len(packed) == 1


def test_a_few_geometries_are_kept_and_none_that_is_stale(packed):
    conv, norm = make()
    norm.eval()
    for size in (5, 6, 5, 6):
        infer(conv, norm, 2, 4, size, size)
    assert len(packed) == 2
    infer(conv, norm, 2, 4, 7, 7)
    assert len(fusion._KEPT[conv]) == fusion.KEPT_GEOMETRIES == 2
    norm.reset_running_stats()
    infer(conv, norm)
    assert len(fusion._KEPT[conv]) == 1


def test_one_convolution_with_two_norms(packed):
    conv, norm = make()
    other = make(seed=3)[1]
    for _ in range(3):
        infer(conv, norm.eval())
        infer(conv, other.eval())
    assert len(packed) == 2


def test_threads_share_what_is_kept(packed):
    conv, norm = make()
    norm.eval()
    infer(conv, norm)
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(infer, conv, norm) for _ in range(16)]:
            future.result()
    assert len(packed) == 1


def test_it_is_no_part_of_the_module():
    conv, norm = make()
    norm.eval()
    before = conv.state_dict().keys(), set(conv.__dict__), repr(conv), len(pickle.dumps(conv))
    infer(conv, norm)
    assert before == (
        *(conv.state_dict().keys(), set(conv.__dict__), repr(conv)),
        len(pickle.dumps(conv)),
    )
    twin = copy.deepcopy(conv)
    assert twin not in fusion._KEPT
    with ge.no_grad():
        twin.weight.zero_()
    infer(twin, norm)
    infer(conv, norm)


def test_it_goes_with_the_module():
    conv, norm = make()
    infer(conv, norm.eval())
    kept = weakref.ref(fusion._KEPT[conv][0].bias)
    del conv
    gc.collect()
    assert kept() is None


# ---- Sequential ----------------------------------------------------------------------------------


@pytest.fixture
def epilogues(monkeypatch):
    """Give the list of what each convolution without gradients did besides: relu or not."""
    found = []
    conv2d = kernels.conv2d

    def noted(*args, relu=None, **options):
        found.append(relu)
        return conv2d(*args, relu=bool(relu), **options)

    monkeypatch.setattr(kernels, "conv2d", noted)
    return found


@pytest.mark.parametrize("training", [True, False])
def test_a_chain_runs_neighbours_fused(epilogues, training):
    conv, norm = make()
    last = nn.Conv2d(6, 6, 1, dtype="float64")
    chain = nn.Sequential(conv, norm, nn.ReLU(), nn.Conv2d(6, 4, 1, dtype="float64"), nn.Tanh())
    chain.extend([*make(seed=2), last, nn.BatchNorm2d(6, dtype="float64"), nn.ReLU()])
    chain.train(training)
    twin = copy.deepcopy(chain)
    x = images(2, 4, 5, 5)
    with ge.no_grad():
        found = chain(x)
        if not training:
            assert epilogues == [True, None, False, True]
        for module in twin:
            x = module(x)
    agree(found, x, 1e-11)
    for ours, theirs in zip(chain.buffers(), twin.buffers(), strict=True):
        agree(ours, theirs)
    assert list(chain.state_dict()) == list(twin.state_dict())
    assert repr(chain) == repr(twin)


def test_hooks_of_a_chains_modules_run_in_order():
    chain = nn.Sequential(*make(), nn.ReLU(), nn.Identity()).eval()
    expected = chain(images(2, 4, 5, 5))
    seen = []
    for name, module in chain.named_children():
        module.register_forward_hook(lambda module, args, output, name=name: seen.append(name))
    agree(chain(images(2, 4, 5, 5)), expected)
    assert seen == ["0", "1", "2", "3"]


def test_a_chain_in_a_chain():
    inner = nn.Sequential({"conv": make()[0], "norm": make()[1]}).eval()
    outer = nn.Sequential(inner, nn.ReLU())
    x = images(2, 4, 5, 5)
    agree(outer(x), F.relu(inner.norm(inner.conv(x))))
