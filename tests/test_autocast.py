"""Mixed precision: in which dtype each operation computes, gradients through it, and its regions."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine import kernels, nn
from gradengine.nn import functional as F
from gradengine.precision import lowered

LOW = [ge.bfloat16, ge.float16]
INDEX = np.array([[0, 1], [2, 0]])
TARGET = np.array([0, 2])


def functional(library: Any) -> Any:
    return library.nn.functional


def target(library: Any) -> Any:
    return library.tensor(TARGET)


def cross_entropy(library: Any, x: Any) -> Any:
    return functional(library).cross_entropy(x, target(library))


def scatter_add(library: Any, x: Any, source: Any) -> Any:
    return library.scatter_add(x, 1, library.tensor(INDEX), source)


# (name, shapes of the inputs, call, what it computes in under autocast): "low" is autocast's dtype,
# "range" is float32, "widest" is what promotion says.
ROWS: list[tuple[str, Any, Callable[..., Any], str]] = [
    ("matmul", [(2, 3), (3, 2)], lambda t, x, y: t.matmul(x, y), "low"),
    ("@", [(2, 3), (3, 2)], lambda t, x, y: x @ y, "low"),
    ("matmul vectors", [(3,), (3,)], lambda t, x, y: t.matmul(x, y), "low"),
    ("mm", [(2, 3), (3, 2)], lambda t, x, y: t.mm(x, y), "low"),
    ("bmm", [(2, 2, 3), (2, 3, 2)], lambda t, x, y: t.bmm(x, y), "low"),
    ("mv", [(2, 3), (3,)], lambda t, x, y: t.mv(x, y), "low"),
    ("einsum", [(2, 3), (3, 2)], lambda t, x, y: t.einsum("ij,jk->ik", x, y), "low"),
    ("linear", [(2, 3), (4, 3), (4,)], lambda t, *x: functional(t).linear(*x), "low"),
    ("dot", [(3,), (3,)], lambda t, x, y: t.dot(x, y), "widest"),
    ("exp", [(2, 3)], lambda t, x: t.exp(x), "range"),
    ("expm1", [(2, 3)], lambda t, x: t.expm1(x), "range"),
    ("log", [(2, 3)], lambda t, x: x.log(), "range"),
    ("log2", [(2, 3)], lambda t, x: t.log2(x), "range"),
    ("log10", [(2, 3)], lambda t, x: t.log10(x), "range"),
    ("log1p", [(2, 3)], lambda t, x: t.log1p(x), "range"),
    ("pow", [(2, 3)], lambda t, x: t.pow(x, 3), "range"),
    ("**", [(2, 3)], lambda t, x: x**2.5, "range"),
    ("number **", [(2, 3)], lambda t, x: 2**x, "range"),
    ("** tensor", [(2, 3), (2, 3)], lambda t, x, y: x**y, "range"),
    ("square", [(2, 3)], lambda t, x: t.square(x), "range"),
    ("rsqrt", [(2, 3)], lambda t, x: t.rsqrt(x), "range"),
    ("reciprocal", [(2, 3)], lambda t, x: t.reciprocal(x), "range"),
    ("number /", [(2, 3)], lambda t, x: 2 / x, "range"),
    ("tan", [(2, 3)], lambda t, x: t.tan(x), "range"),
    ("softplus", [(2, 3)], lambda t, x: functional(t).softplus(x), "range"),
    ("softmax", [(2, 3)], lambda t, x: t.softmax(x, 1), "range"),
    ("log_softmax", [(2, 3)], lambda t, x: x.log_softmax(1), "range"),
    ("sum", [(2, 3)], lambda t, x: x.sum(), "range"),
    ("sum dim", [(2, 3)], lambda t, x: x.sum(0, keepdim=True), "range"),
    ("prod", [(2, 3)], lambda t, x: t.prod(x), "range"),
    ("cumsum", [(2, 3)], lambda t, x: t.cumsum(x, 1), "range"),
    ("norm", [(2, 3)], lambda t, x: t.norm(x), "range"),
    ("logsumexp", [(2, 3)], lambda t, x: t.logsumexp(x, 1), "range"),
    (
        *("layer_norm", [(2, 3), (3,), (3,)]),
        lambda t, x, w, b: functional(t).layer_norm(x, (3,), w, b),
        "range",
    ),
    ("cross_entropy", [(2, 3)], cross_entropy, "range"),
    ("nll_loss", [(2, 3)], lambda t, x: functional(t).nll_loss(x, target(t)), "range"),
    ("mse_loss", [(2, 3), (2, 3)], lambda t, x, y: functional(t).mse_loss(x, y), "range"),
    ("l1_loss", [(2, 3), (2, 3)], lambda t, x, y: functional(t).l1_loss(x, y), "range"),
    ("smooth_l1", [(2, 3), (2, 3)], lambda t, x, y: functional(t).smooth_l1_loss(x, y), "range"),
    ("huber_loss", [(2, 3), (2, 3)], lambda t, x, y: functional(t).huber_loss(x, y), "range"),
    (
        *("with_logits", [(2, 3), (2, 3)]),
        lambda t, x, y: functional(t).binary_cross_entropy_with_logits(x, y),
        "range",
    ),
    (
        *("interpolate", [(1, 1, 2, 3)]),
        lambda t, x: functional(t).interpolate(x, scale_factor=2, mode="bilinear"),
        "range",
    ),
    ("add", [(2, 3), (2, 3)], lambda t, x, y: x + y, "widest"),
    ("mul", [(2, 3), (2, 3)], lambda t, x, y: x * y, "widest"),
    ("div", [(2, 3), (2, 3)], lambda t, x, y: x / y, "widest"),
    ("cat", [(2, 3), (2, 3)], lambda t, x, y: t.cat([x, y]), "widest"),
    ("maximum", [(2, 3), (2, 3)], lambda t, x, y: t.maximum(x, y), "widest"),
    ("outer", [(3,), (3,)], lambda t, x, y: t.outer(x, y), "widest"),
    ("scatter_add", [(2, 3), (2, 2)], scatter_add, "widest"),
    ("relu", [(2, 3)], lambda t, x: t.relu(x), "widest"),
    ("sqrt", [(2, 3)], lambda t, x: t.sqrt(x), "widest"),
    ("sigmoid", [(2, 3)], lambda t, x: t.sigmoid(x), "widest"),
    ("tanh", [(2, 3)], lambda t, x: t.tanh(x), "widest"),
    ("gelu", [(2, 3)], lambda t, x: functional(t).gelu(x, approximate="tanh"), "widest"),
    ("mean", [(2, 3)], lambda t, x: x.mean(), "widest"),
    ("var", [(2, 3)], lambda t, x: x.var(), "widest"),
    ("amax", [(2, 3)], lambda t, x: t.amax(x, 1), "widest"),
    ("* number", [(2, 3)], lambda t, x: x * 1.5, "widest"),
]
NAMES = [row[0] for row in ROWS]


def values(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(len(shape)).uniform(0.5, 1.5, shape)


def tensors(shapes: Any, *dtypes: Any) -> list[ge.Tensor]:
    return [
        ge.tensor(values(shape), dtype=dtypes[min(i, len(dtypes) - 1)], requires_grad=True)
        for i, shape in enumerate(shapes)
    ]


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def on_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make new tensors on a GPU, or let NumPy arrays count as CUDA's, computed as on the CPU."""
    if request.param == "cupy":
        ge.set_default_device("cuda")
        return
    family = kernels._import_family
    monkeypatch.setattr(kernels, "place", lambda array: "cuda")
    monkeypatch.setattr(kernels, "_import_family", lambda device, name: family("cpu", name))


# ---- what computes in which dtype ----------------------------------------------------------------


def host(tensor: ge.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().astype(np.float64)


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize(("shapes", "call", "policy"), [row[1:] for row in ROWS], ids=NAMES)
def test_result_dtype(shapes, call, policy, low):
    other = ge.float16 if low == ge.bfloat16 else ge.bfloat16
    in_32, in_16, in_other = ge.float32, low, other
    expected = {
        "low": [low, low, low, low],
        "range": [ge.float32] * 4,
        # of two inputs the first is float32 in the third case, and the second float16 in the fourth
        "widest": [ge.float32, low, ge.float32, ge.float32 if len(shapes) > 1 else other],
    }[policy]
    given = [(in_32,), (in_16,), (in_32, in_16), (in_other, in_16)]
    for dtypes, wanted in zip(given, expected, strict=True):
        inputs = tensors(shapes, *dtypes)
        with ge.autocast("cuda", dtype=low):
            out = call(ge, *inputs)
        assert out.dtype == wanted
        exact = host(call(ge, *tensors(shapes, ge.float64)))
        np.testing.assert_allclose(host(out), exact, rtol=0.04, atol=0.04)
        out.backward(ge.ones_like(out))
        for leaf, dtype in zip(inputs, dtypes + dtypes[-1:] * 2, strict=False):
            if leaf.grad is not None:
                assert leaf.grad.dtype == dtype


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize(("shapes", "call"), [row[1:3] for row in ROWS], ids=NAMES)
def test_float64_and_integers_are_left_alone(shapes, call):
    plain = call(ge, *tensors(shapes, ge.float64))
    with ge.autocast("cuda", dtype=ge.bfloat16):
        out = call(ge, *tensors(shapes, ge.float64))
        assert ge.arange(3).sum().dtype == ge.int64
        assert (ge.arange(3) ** 2).dtype == ge.int64
    assert out.dtype == ge.float64
    np.testing.assert_array_equal(host(out), host(plain))


# PyTorch's lists for the CPU are shorter than CUDA's: they leave these alone.
NOT_ON_PYTORCHS_CPU = {
    *("exp", "expm1", "log", "log2", "log10", "log1p", "pow", "**", "number **", "** tensor"),
    *("square", "rsqrt", "reciprocal", "number /", "tan", "softplus", "softmax", "log_softmax"),
    *("sum", "sum dim", "cumsum", "norm", "logsumexp", "cross_entropy", "l1_loss", "dot"),
    *("smooth_l1", "interpolate", "scatter_add", "mv", "layer_norm"),
}


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize(
    ("shapes", "call"),
    [pytest.param(*row[1:3], id=row[0]) for row in ROWS if row[0] not in NOT_ON_PYTORCHS_CPU],
)
def test_result_dtype_is_pytorchs(shapes, call):
    torch = pytest.importorskip("torch")
    for dtypes in (("float32",), ("bfloat16",), ("float32", "bfloat16")):
        names = [dtypes[min(i, len(dtypes) - 1)] for i in range(len(shapes))]
        theirs = [
            torch.tensor(values(shape), dtype=getattr(torch, dtype))
            for shape, dtype in zip(shapes, names, strict=True)
        ]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = call(torch, *theirs)
        with ge.autocast("cuda", dtype=ge.bfloat16):
            found = call(ge, *tensors(shapes, *dtypes))
        assert str(found.dtype) == str(expected.dtype).removeprefix("torch.")


@pytest.mark.usefixtures("on_cuda")
def test_an_explicit_dtype_is_kept():
    x = ge.ones(3, dtype=ge.bfloat16)
    with ge.autocast("cuda", dtype=ge.bfloat16):
        assert x.sum(dtype=ge.bfloat16).dtype == ge.bfloat16
        assert ge.cumsum(x, 0, dtype=ge.float64).dtype == ge.float64


def test_tensors_of_the_cpu_are_left_alone():
    x, y = ge.ones(2, 3, device="cpu"), ge.ones(3, 2, device="cpu")
    with ge.autocast("cuda"):
        assert (x @ y).dtype == ge.float32
        assert ge.exp(x.half()).dtype == ge.float16
        assert lowered(None) is None
        assert lowered(2.0) == 2.0


@pytest.mark.usefixtures("on_cuda")
def test_arrays_are_converted_as_tensors_are():
    x = ge.ones(2, 3).array
    with ge.autocast("cuda", dtype=ge.bfloat16):
        assert ge.matmul(x, x.T).dtype == ge.bfloat16
        assert ge.softmax(x.astype(np.float16), 1).dtype == np.float32


# ---- regions -------------------------------------------------------------------------------------


def product_dtype() -> Any:
    x = ge.ones(2, 2)
    return (x @ x).dtype


@pytest.mark.usefixtures("on_cuda")
def test_regions_nest():
    assert not ge.is_autocast_enabled()
    with ge.autocast("cuda"):
        assert ge.is_autocast_enabled()
        assert product_dtype() == ge.float16
        with ge.autocast("cuda", dtype=ge.bfloat16):
            assert product_dtype() == ge.bfloat16
            with ge.autocast("cuda", enabled=False):
                assert not ge.is_autocast_enabled()
                assert product_dtype() == ge.float32
            assert product_dtype() == ge.bfloat16
        assert product_dtype() == ge.float16
    assert product_dtype() == ge.float32


@pytest.mark.usefixtures("on_cuda")
def test_a_region_ends_with_an_exception():
    with pytest.raises(ZeroDivisionError), ge.autocast("cuda"), ge.autocast("cuda"):
        raise ZeroDivisionError
    assert not ge.is_autocast_enabled()
    assert product_dtype() == ge.float32


@pytest.mark.usefixtures("on_cuda")
def test_it_decorates():
    region = ge.autocast("cuda", dtype=ge.bfloat16)

    @region
    def dtypes(depth: int) -> list[Any]:
        """Multiply."""
        return [product_dtype(), *(dtypes(depth - 1) if depth else [])]

    assert dtypes(2) == [ge.bfloat16] * 3
    assert (dtypes.__name__, dtypes.__doc__) == ("dtypes", "Multiply.")
    assert product_dtype() == ge.float32
    with region, region:
        assert product_dtype() == ge.bfloat16
    assert product_dtype() == ge.float32


@pytest.mark.usefixtures("on_cuda")
def test_each_thread_has_its_own():
    found: list[Any] = []
    with ge.autocast("cuda"):
        thread = threading.Thread(target=lambda: found.append(product_dtype()))
        thread.start()
        thread.join()
        assert product_dtype() == ge.float16
    assert found == [ge.float32]


@pytest.mark.parametrize("device_type", ["cpu", "cuda:0", "mps"])
def test_other_device_types_are_refused(device_type):
    with pytest.raises(ValueError, match="mixed precision is for CUDA tensors"):
        ge.autocast(device_type)


@pytest.mark.parametrize("dtype", [ge.float32, ge.int64])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="dtype must be float16 or bfloat16"):
        ge.autocast("cuda", dtype=dtype)


# ---- conversions and gradients -------------------------------------------------------------------


@pytest.mark.usefixtures("on_cuda")
def test_a_parameter_is_converted_once_in_a_region():
    weight, x = ge.ones(2, 2, requires_grad=True), ge.ones(2, 2)
    with ge.autocast("cuda", dtype=ge.bfloat16):
        first = lowered(weight)
        with ge.autocast("cuda", dtype=ge.bfloat16):
            assert lowered(weight) is first
        assert lowered(weight) is first
        assert lowered(x) is not lowered(x)  # no parameter: held no longer than it is needed
        with ge.no_grad():
            assert not lowered(weight).requires_grad
            weight.mul_(2)
        assert lowered(weight).tolist() == [[2, 2], [2, 2]]
        with ge.no_grad():
            weight.data = ge.zeros(2, 2)
        second = lowered(weight)
        assert second.tolist() == [[0, 0], [0, 0]]
        with ge.autocast("cuda", dtype=ge.float16):
            assert lowered(weight).dtype == ge.float16
        assert lowered(weight) is second
    with ge.autocast("cuda", dtype=ge.bfloat16):
        assert lowered(weight) is not second
    with ge.autocast("cuda", dtype=ge.bfloat16, cache_enabled=False):
        assert lowered(weight) is not lowered(weight)


@pytest.mark.usefixtures("on_cuda")
def test_a_region_converts_at_once_what_the_last_one_did(monkeypatch):
    converted = []
    cast_all = kernels.cast_all

    def noted(arrays: Any, dtype: Any) -> Any:
        converted.append(len(arrays))
        return cast_all(arrays, dtype)

    monkeypatch.setattr(kernels, "cast_all", noted)
    weights = [ge.full((2, 2), float(i), requires_grad=True) for i in range(4)]

    def region(weights: Any) -> list[int]:
        converted.clear()
        with ge.autocast("cuda", dtype=ge.bfloat16):
            for weight in weights:
                assert lowered(weight).tolist() == weight.tolist()
                assert lowered(weight).grad_fn.name() == "ToCopyBackward0"
        return converted.copy()

    assert region(weights[:3]) == [1, 1, 1]
    assert region(weights) == [3, 1]
    with ge.no_grad():
        weights[1].fill_(7)  # what was converted then is not kept
    assert region(weights) == [4]
    assert region(weights[1:]) == [1, 1, 1]  # another begins this one
    weights[2].requires_grad = False
    weights[3].data = weights[3].data.double()
    converted.clear()
    with ge.autocast("cuda", dtype=ge.bfloat16):
        assert lowered(weights[0]).tolist() == [[0, 0], [0, 0]]
    assert converted == [2]
    with ge.autocast("cuda", dtype=ge.bfloat16):
        assert lowered(weights[1]).tolist() == [[7, 7], [7, 7]]
    assert converted == [2, 1]


@pytest.mark.usefixtures("on_cuda")
def test_nothing_is_held_after_a_region():
    weight = ge.ones(2, 2, requires_grad=True)
    with ge.autocast("cuda"):
        held = weakref.ref(lowered(weight))
        gc.collect()
        assert held() is not None
    gc.collect()
    assert held() is None


@pytest.mark.usefixtures("on_cuda")
def test_a_parameter_used_twice_has_both_gradients():
    weight = ge.full((2, 2), 3.0, requires_grad=True)
    x = ge.ones(2, 2)
    with ge.autocast("cuda", dtype=ge.bfloat16):
        out = ((x @ weight) @ weight).sum()
    out.backward()
    assert (out.dtype, weight.grad.dtype) == (ge.float32, ge.float32)
    assert weight.grad.tolist() == [[24, 24], [24, 24]]


@pytest.mark.usefixtures("on_cuda")
def test_backward_under_autocast_gives_the_same():
    def gradient(inside: bool) -> list[Any]:
        weight = ge.tensor(values((3, 3)), dtype=ge.float32, requires_grad=True)
        x = ge.tensor(values((2, 3)), dtype=ge.float32)
        with ge.autocast("cuda", dtype=ge.bfloat16):
            loss = ge.softmax(F.gelu(x @ weight) @ weight, 1).log().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return weight.grad.tolist()

    assert gradient(True) == gradient(False)


@pytest.mark.usefixtures("on_cuda")
def test_second_derivatives_under_autocast():
    x = ge.tensor([[0.5, -1.0]], requires_grad=True)
    weight = ge.tensor([[1.0], [2.0]], requires_grad=True)
    with ge.autocast("cuda", dtype=ge.bfloat16):
        (first,) = ge.autograd.grad(((x @ weight) ** 3).sum(), [x], create_graph=True)
        first.sum().backward()
    # f = (x w)^3: f' = 3 (x w)^2 w, and the sum of f' has the gradient 6 (x w) sum(w) w by x
    assert first.tolist() == [[6.75, 13.5]]
    assert x.grad.tolist() == [[-27.0, -54.0]]


# ---- a network on the emulated device ------------------------------------------------------------


class Block(nn.Module):
    """A small residual network with all that a ResNet has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(8, 4)
        self.seen: list[Any] = []

    def forward(self, x: ge.Tensor) -> ge.Tensor:
        x = nn.conv_norm(x, self.conv1, self.bn1, activation=self.relu)
        y = nn.conv_norm(x, self.conv2, self.bn2, activation=self.relu, residual=x)
        z = self.pool(y)
        mean = F.adaptive_avg_pool2d(z, 1).flatten(1)
        out = self.fc(mean)
        self.seen = [t.dtype for t in (x, y, z, mean, out)]
        return out


def block() -> Block:
    ge.manual_seed(0)
    made = Block()
    made.bn1.running_mean.fill_(0.25)
    made.bn2.running_var.fill_(2.0)
    return made


IMAGES = np.random.default_rng(1).standard_normal((2, 3, 6, 6))
LABELS = np.array([1, 3])


def trained(model: Block, dtype: Any, autocast: Any) -> dict[str, Any]:
    images = ge.tensor(IMAGES, dtype=dtype)
    if autocast is None:
        loss = F.cross_entropy(model(images), ge.tensor(LABELS))
    else:
        with ge.autocast("cuda", dtype=autocast):
            loss = F.cross_entropy(model(images), ge.tensor(LABELS))
        assert loss.dtype == ge.float32
    loss.backward()
    found = {name: host(parameter.grad) for name, parameter in model.named_parameters()}
    return found | {"loss": np.float64(loss.item())}


on_kernels = pytest.mark.parametrize(
    "where", ["emulated", pytest.param("cupy", marks=pytest.mark.gpu)]
)


def use_cuda(where: str, request: pytest.FixtureRequest) -> None:
    if where == "emulated":
        request.getfixturevalue("emulated_cuda")
    else:
        ge.set_default_device("cuda")


@on_kernels
@pytest.mark.parametrize("low", LOW, ids=str)
def test_a_network_trains(low, where, request):
    exact = trained(block().double(), ge.float64, None)
    use_cuda(where, request)
    model = block()
    found = trained(model, ge.float32, low)
    assert model.seen == [low] * 5
    error = 2.0**-8 if low == ge.bfloat16 else 2.0**-11
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == ge.float32
        distance = np.linalg.norm(found[name] - exact[name])
        assert distance <= 8 * error * np.linalg.norm(exact[name]), name
    np.testing.assert_allclose(found["loss"], exact["loss"], rtol=4 * error)
    assert model.bn1.running_mean is not None
    np.testing.assert_allclose(host(model.bn1.running_mean), 0.225, atol=0.1)
    assert model.bn1.running_mean.dtype == ge.float32


@on_kernels
@pytest.mark.parametrize("low", LOW, ids=str)
def test_the_gradient_of_a_convolutions_weight_is_not_rounded_to_16_bits(low, where, request):
    use_cuda(where, request)
    weight = ge.rand(8, 8, 3, 3, requires_grad=True)
    x = ge.rand(2, 8, 6, 6)
    with ge.autocast("cuda", dtype=low):
        loss = F.conv2d(x, weight).sum() * 0.001
    loss.backward()
    assert weight.grad.dtype == ge.float32
    assert (weight.grad.to(low).to(ge.float32) != weight.grad).any()
    with ge.autocast("cuda", dtype=low):
        loss = F.conv2d(x, weight).sum() * 0.001
    (recorded,) = ge.autograd.grad(loss, weight, create_graph=True)
    assert recorded.dtype == ge.float32
    np.testing.assert_allclose(host(weight.grad), host(recorded), rtol=2.0**-8)


@on_kernels
@pytest.mark.parametrize("low", LOW, ids=str)
def test_a_network_evaluates_with_folded_weights_of_each_dtype(low, where, request, monkeypatch):
    exact = host(block().double().eval()(ge.tensor(IMAGES)))
    use_cuda(where, request)
    packed: list[Any] = []
    pack = kernels.pack_conv2d
    monkeypatch.setattr(
        kernels,
        "pack_conv2d",
        lambda weight, geometry: packed.append(weight.dtype) or pack(weight, geometry),
    )
    model, images = block().eval(), ge.tensor(IMAGES, dtype=ge.float32)

    def run(autocast: bool) -> ge.Tensor:
        with ge.no_grad(), ge.autocast("cuda", dtype=low, enabled=autocast):
            out = model(images)
        assert model.seen == [low if autocast else ge.float32] * 5
        return out

    out, full = run(True), run(False)
    assert run(True).tolist() == out.tolist()
    assert run(False).tolist() == full.tolist()
    assert packed == [low, low, ge.float32, ge.float32]
    error = 2.0**-8 if low == ge.bfloat16 else 2.0**-11
    bound = 4 * error * np.abs(exact).max()
    np.testing.assert_allclose(host(out), exact, rtol=0, atol=bound)
    np.testing.assert_allclose(host(full), exact, rtol=0, atol=5e-3)
    with pytest.raises(TypeError, match="one dtype"), ge.no_grad():
        model(images.to(low))
