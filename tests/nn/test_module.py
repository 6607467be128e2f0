"""Module: attributes, iteration, modes, conversion, copies, representation."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import gradengine as ge
from gradengine import nn


class Net(nn.Module):
    """Two layers, a buffer and a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 2, bias=False)
        self.scale = nn.Parameter(ge.ones(1))
        self.register_buffer("offset", ge.zeros(2))
        self.register_buffer("cache", ge.zeros(2), persistent=False)
        self.name = "net"

    def forward(self, x):
        return self.second(self.norm(self.first(x)).relu()) * self.scale + self.offset


def test_attributes_are_registered_by_what_they_are():
    net = Net()
    assert list(net._parameters) == ["scale"]
    assert list(net._buffers) == ["offset", "cache"]
    assert list(net._modules) == ["first", "norm", "second"]
    assert net.second.bias is None
    assert net.name == "net"
    assert {"scale", "offset", "first", "name"} <= set(dir(net))


def test_an_attribute_moves_between_registries():
    net = Net()
    net.first = nn.Parameter(ge.ones(2))
    assert list(net._modules) == ["norm", "second"]
    assert list(net._parameters) == ["scale", "first"]
    net.cache = nn.Identity()
    assert "cache" not in net._buffers
    net.register_buffer("cache2", ge.zeros(1))
    assert "cache2" in net.state_dict()
    net.plain = 3
    net.plain = nn.Parameter(ge.ones(1))
    assert isinstance(net.plain, nn.Parameter)
    assert "plain" not in net.__dict__


def test_none_and_tensors_take_a_registered_place():
    net = Net()
    net.scale = None
    net.first = None
    net.offset = None
    assert (net.scale, net.first, net.offset) == (None, None, None)
    net.cache = ge.ones(2)
    assert "cache" in net._buffers
    assert "cache" not in net.state_dict()
    assert [name for name, _ in net.named_parameters()] == [
        "norm.weight",
        "norm.bias",
        "second.weight",
    ]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scale", 3.0, "cannot assign 'float' as parameter 'scale'"),
        ("scale", ge.ones(1, device="cpu"), "cannot assign 'Tensor' as parameter 'scale'"),
        ("first", 3.0, "cannot assign 'float' as child module 'first'"),
        ("offset", 3.0, "cannot assign 'float' as buffer 'offset'"),
    ],
)
def test_a_registered_place_takes_only_its_kind(name, value, message):
    net = Net()
    with pytest.raises(TypeError, match=message):
        setattr(net, name, value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (nn.Parameter(ge.ones(1, device="cpu")), "cannot assign parameters before"),
        (nn.Identity(), "cannot assign modules before"),
    ],
)
def test_nothing_is_registered_before_init(value, message):
    class Early(nn.Module):
        def __init__(self):
            self.value = value

    with pytest.raises(AttributeError, match=message):
        Early()


def test_plain_attributes_may_be_set_before_init():
    class Early(nn.Module):
        def __init__(self):
            self.width = 3
            super().__init__()

    assert Early().width == 3


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("a.b", KeyError, "cannot be empty or contain a dot"),
        ("", KeyError, "cannot be empty or contain a dot"),
        ("forward", KeyError, "attribute already exists; got name=forward"),
        (3, TypeError, "name should be a string; got int"),
    ],
)
def test_bad_names_are_refused(name, error, message):
    net = Net()
    with pytest.raises(error, match=message):
        net.register_parameter(name, nn.Parameter(ge.ones(1)))
    with pytest.raises(error, match=message):
        net.register_buffer(name, ge.ones(1))
    with pytest.raises(error, match=message):
        net.add_module(name, nn.Identity())


def test_missing_attributes_are_named():
    net = Net()
    with pytest.raises(AttributeError, match="'Net' object has no attribute 'third'"):
        _ = net.third
    del net.first
    with pytest.raises(AttributeError, match="'Net' object has no attribute 'first'"):
        _ = net.first
    del net.name
    assert not hasattr(net, "name")

    class Early(nn.Module):
        def __init__(self):
            _ = self.layer

    with pytest.raises(AttributeError, match=r"'layer' before Module.__init__\(\) call"):
        Early()


def test_forward_must_be_defined():
    with pytest.raises(
        NotImplementedError, match=r'Module \[Module\] is missing the required "forward"'
    ):
        nn.Module()(1)


# ---- iteration -----------------------------------------------------------------------------------


def test_names_are_dotted_and_in_order():
    net = nn.Sequential(Net(), nn.Linear(2, 1))
    assert [name for name, _ in net.named_modules()] == [
        "",
        "0",
        "0.first",
        "0.norm",
        "0.second",
        "1",
    ]
    assert [name for name, _ in net.named_modules("m")][:3] == ["m", "m.0", "m.0.first"]
    assert [name for name, _ in net.named_parameters("m", recurse=True)][:2] == [
        "m.0.scale",
        "m.0.first.weight",
    ]
    assert list(net.parameters(recurse=False)) == []
    assert [name for name, _ in net[0].named_parameters(recurse=False)] == ["scale"]
    assert [name for name, _ in net.named_buffers()] == [
        "0.offset",
        "0.cache",
        "0.norm.running_mean",
        "0.norm.running_var",
        "0.norm.num_batches_tracked",
    ]
    assert [name for name, _ in net[0].named_children()] == ["first", "norm", "second"]


def test_shared_parts_come_once():
    layer = nn.Linear(2, 2)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    net.register_parameter("tied", layer.weight)
    assert len(list(net.parameters())) == 2
    assert len(list(net.modules())) == 3
    assert len(list(net.children())) == 2
    assert [name for name, _ in net.named_parameters()] == ["tied", "0.bias"]
    assert [name for name, _ in net.named_parameters(remove_duplicate=False)] == [
        "tied",
        *("0.weight", "0.bias", "2.weight", "2.bias"),
    ]
    assert list(net.state_dict()) == ["tied", "0.weight", "0.bias", "2.weight", "2.bias"]


def test_parts_are_found_by_path():
    net = nn.Sequential(Net(), nn.Linear(2, 1))
    assert net.get_submodule("") is net
    assert net.get_submodule("0.first") is net[0].first
    assert net.get_parameter("0.first.weight") is net[0].first.weight
    assert net.get_buffer("0.offset") is net[0].offset
    with pytest.raises(AttributeError, match="Net has no module `third`; got target='0.third'"):
        net.get_submodule("0.third")
    with pytest.raises(AttributeError, match="Linear has no parameter `gain`"):
        net.get_parameter("1.gain")
    with pytest.raises(AttributeError, match="Net has no buffer `scale`"):
        net.get_buffer("0.scale")


def test_apply_visits_children_first():
    seen = []
    net = Net()
    assert net.apply(lambda module: seen.append(type(module).__name__)) is net
    assert seen == ["Linear", "BatchNorm1d", "Linear", "Net"]


# ---- modes ---------------------------------------------------------------------------------------


def test_modes_reach_everything_below():
    net = nn.Sequential(Net())
    assert net.training
    assert net.eval() is net
    assert not any(module.training for module in net.modules())
    assert net.train() is net
    assert all(module.training for module in net.modules())
    with pytest.raises(ValueError, match="training mode is expected to be boolean; got mode='yes'"):
        net.train("yes")  # type: ignore[arg-type]


def test_requires_grad_is_set_for_all_parameters():
    net = Net()
    assert net.requires_grad_(False) is net
    assert list(net.trainable_parameters()) == []
    net.first.requires_grad_(True)
    assert list(net.trainable_parameters()) == [net.first.weight, net.first.bias]


def test_zero_grad_forgets_or_fills():
    net = Net()
    net(ge.ones(5, 3)).sum().backward()
    kept = net.first.weight.grad
    net.zero_grad(set_to_none=False)
    assert net.first.weight.grad is kept
    assert not kept.array.any()
    net.zero_grad()
    assert all(parameter.grad is None for parameter in net.parameters())


# ---- conversion ----------------------------------------------------------------------------------


def test_conversion_keeps_parameters_and_converts_gradients():
    net = Net()
    net(ge.ones(5, 3)).sum().backward()
    before = list(net.parameters())
    assert net.double() is net
    assert all(a is b for a, b in zip(before, net.parameters(), strict=True))
    assert {parameter.dtype.name for parameter in net.parameters()} == {"float64"}
    assert {parameter.grad.dtype.name for parameter in net.parameters()} == {"float64"}
    assert net.norm.num_batches_tracked.dtype == ge.int64
    assert net.norm.running_mean.dtype == ge.float64
    net(ge.ones(5, 3, dtype="float64")).sum().backward()
    assert net.half().scale.dtype == ge.float16
    assert net.float().scale.dtype == ge.float32
    assert net.to("cpu", ge.float64).scale.dtype == ge.float64
    assert net.to(ge.ones(1)).scale.dtype == ge.float32
    assert net.cpu().scale.device == ge.device("cpu")


def test_a_conversion_that_changes_nothing_copies_nothing():
    net = Net()
    arrays = [parameter.array for parameter in net.parameters()]
    net.to("cpu", ge.float32)
    assert all(a is p.array for a, p in zip(arrays, net.parameters(), strict=True))


def test_a_module_takes_no_integer_dtype():
    net = Net()
    with pytest.raises(TypeError, match="only accepts floating point dtypes; got dtype=int64"):
        net.to(ge.int64)
    assert net.first.weight.dtype == ge.float32


@pytest.mark.gpu
def test_a_module_moves_to_the_gpu_and_back():
    net = Net()
    before = [parameter.array.copy() for parameter in net.parameters()]
    parameters = list(net.parameters())
    net.cuda()
    assert all(parameter.is_cuda for parameter in parameters)
    net(ge.ones(5, 3, device="cuda")).sum().backward()
    net.cpu()
    assert not any(parameter.grad.is_cuda for parameter in parameters)
    for array, parameter in zip(before, parameters, strict=True):
        np.testing.assert_array_equal(parameter.array, array)


# ---- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_equal_and_independent(copied):
    net = Net()
    net.tied = net.first.weight
    net.first.bias.requires_grad = False
    net.eval()
    other = copied(net)
    x = ge.randn(5, 3)
    np.testing.assert_array_equal(other(x).detach().array, net(x).detach().array)
    assert other.tied is other.first.weight
    assert not other.training
    assert not other.first.bias.requires_grad
    assert list(other.state_dict()) == list(net.state_dict())
    with ge.no_grad():
        other.first.weight.zero_()
    assert net.first.weight.array.any()


# ---- representation ------------------------------------------------------------------------------


def test_repr_is_a_tree():
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Identity())
    assert repr(net) == (
        "Sequential(\n"
        "  (0): Sequential(\n"
        "    (0): Linear(in_features=3, out_features=4, bias=True)\n"
        "    (1): ReLU()\n"
        "  )\n"
        "  (1): Identity()\n"
        ")"
    )


def test_repr_of_a_module_with_its_own_line_and_children():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Tanh()

        def extra_repr(self):
            return "scale=2"

    assert repr(Scaled()) == "Scaled(\n  scale=2\n  (inner): Tanh()\n)"
