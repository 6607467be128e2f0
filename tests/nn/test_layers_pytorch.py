"""Every layer beside PyTorch's: its line in a repr, its state, its result and its gradients."""

from __future__ import annotations

import re

import numpy as np
import pytest

import gradengine as ge
from gradengine import nn

torch = pytest.importorskip("torch")

# Name of a layer, arguments, shape of the input
LAYERS = [
    ("Linear", (5, 3), {}, (4, 5)),
    ("Linear", (5, 3), {"bias": False}, (2, 4, 5)),
    ("Conv1d", (3, 4, 3), {"stride": 2, "padding": 1}, (2, 3, 9)),
    ("Conv2d", (4, 6, 3), {"stride": (2, 1), "padding": 1, "groups": 2}, (2, 4, 7, 6)),
    ("Conv2d", (3, 4, (3, 2)), {"dilation": 2, "bias": False}, (2, 3, 8, 8)),
    ("Conv2d", (3, 4, 3), {"padding": "same"}, (2, 3, 6, 6)),
    ("BatchNorm1d", (3,), {}, (6, 3)),
    ("BatchNorm1d", (3,), {"momentum": None}, (6, 3, 4)),
    ("BatchNorm2d", (3,), {"eps": 0.1, "momentum": 0.3}, (4, 3, 5, 5)),
    ("BatchNorm2d", (3,), {"affine": False}, (4, 3, 5, 5)),
    ("BatchNorm2d", (3,), {"track_running_stats": False}, (4, 3, 5, 5)),
    ("LayerNorm", (6,), {}, (4, 6)),
    ("LayerNorm", ((3, 4),), {"bias": False, "eps": 0.1}, (2, 3, 4)),
    ("LayerNorm", (6,), {"elementwise_affine": False}, (4, 6)),
    ("ReLU", (), {}, (3, 4)),
    ("ReLU", (), {"inplace": True}, (3, 4)),
    ("LeakyReLU", (0.2,), {}, (3, 4)),
    ("LeakyReLU", (), {"inplace": True}, (3, 4)),
    ("ELU", (1.5,), {}, (3, 4)),
    ("ELU", (), {"inplace": True}, (3, 4)),
    ("GELU", (), {}, (3, 4)),
    ("GELU", (), {"approximate": "tanh"}, (3, 4)),
    ("SiLU", (), {}, (3, 4)),
    ("SiLU", (), {"inplace": True}, (3, 4)),
    ("Softplus", (), {"beta": 2.0, "threshold": 1.0}, (3, 4)),
    ("Sigmoid", (), {}, (3, 4)),
    ("Tanh", (), {}, (3, 4)),
    ("Softmax", (), {"dim": 1}, (3, 4)),
    ("LogSoftmax", (), {"dim": -1}, (3, 4)),
    ("MaxPool2d", (3,), {"stride": 2, "padding": 1}, (2, 3, 7, 8)),
    ("MaxPool2d", ((2, 3),), {"ceil_mode": True}, (2, 3, 7, 8)),
    ("AvgPool2d", (2,), {}, (2, 3, 7, 8)),
    ("AvgPool2d", (3, 2, 1), {"count_include_pad": False}, (2, 3, 7, 8)),
    ("AdaptiveAvgPool2d", ((1, 1),), {}, (2, 3, 7, 8)),
    ("AdaptiveAvgPool2d", (3,), {}, (2, 3, 7, 8)),
    ("Flatten", (), {}, (2, 3, 4)),
    ("Flatten", (0, 1), {}, (2, 3, 4)),
    ("Unflatten", (1, (2, 3)), {}, (4, 6)),
    ("Upsample", (), {"scale_factor": 2.0, "mode": "nearest"}, (2, 3, 4, 5)),
    ("Upsample", (), {"size": (7, 9), "mode": "bilinear", "align_corners": True}, (2, 3, 4, 5)),
    ("Identity", (), {}, (3, 4)),
    ("Dropout", (0.0,), {}, (3, 4)),
    ("Dropout", (0.5, True), {}, (3, 4)),  # compared in evaluation mode only
]


def case_name(case):
    name, args, kwargs, _ = case
    return "-".join(map(str, [name, *args, *kwargs.values()]))


def pair(name, args, kwargs):
    """Return PyTorch's layer and ours, in float64 and with the same state."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(*args, **kwargs).double()
    for tensor in (*theirs.parameters(), *theirs.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    ours = getattr(nn, name)(*args, **kwargs).double()
    ours.load_state_dict({key: value.numpy() for key, value in theirs.state_dict().items()})
    return theirs, ours


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours.detach().array, theirs.detach().numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", LAYERS, ids=case_name)
def test_layer(case):
    name, args, kwargs, shape = case
    theirs, ours = pair(name, args, kwargs)
    # PyTorch's batch norm has an argument `bias` beside `affine`; ours has not.
    assert repr(ours) == re.sub(r"( affine=\w+), bias=\w+", r"\1", repr(theirs))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    generator = np.random.default_rng(0)
    drops = name == "Dropout" and args[0] > 0
    for training in (False,) if drops else (True, True, False):
        theirs.train(training)
        ours.train(training)
        values = generator.standard_normal(shape)
        x = ge.tensor(values, requires_grad=True)
        x_theirs = torch.tensor(values, requires_grad=True)
        out, out_theirs = (
            ours(x),
            theirs(x_theirs.clone()),
        )  # a clone, for layers that work in place
        assert_close(out, out_theirs)
        grad = generator.standard_normal(out.shape)
        out.backward(ge.tensor(grad))
        out_theirs.backward(torch.tensor(grad))
        assert_close(x.grad, x_theirs.grad)
    for key, value in ours.state_dict().items():
        assert_close(value, theirs.state_dict()[key])
    for ours_parameter, parameter in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(ours_parameter.grad, parameter.grad)


def test_state_passes_to_pytorch():
    ours = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    theirs = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    theirs.load_state_dict({k: torch.tensor(v.array) for k, v in ours.state_dict().items()})
    metadata = ours.state_dict()._metadata  # type: ignore[attr-defined]
    assert metadata == theirs.state_dict()._metadata  # type: ignore[attr-defined]


LOSSES = [
    ("CrossEntropyLoss", {}, "classes"),
    ("CrossEntropyLoss", {"label_smoothing": 0.1, "ignore_index": 1}, "classes"),
    ("CrossEntropyLoss", {"weight": [1.0, 2.0, 0.5], "reduction": "sum"}, "classes"),
    ("NLLLoss", {"reduction": "none"}, "classes"),
    ("NLLLoss", {"weight": [1.0, 2.0, 0.5]}, "classes"),
    ("MSELoss", {}, "values"),
    ("MSELoss", {"reduction": "sum"}, "values"),
    ("L1Loss", {"reduction": "none"}, "values"),
    ("SmoothL1Loss", {"beta": 0.3}, "values"),
    ("BCEWithLogitsLoss", {}, "shares"),
    ("BCEWithLogitsLoss", {"pos_weight": [1.0, 2.0, 0.5], "weight": [3.0, 1.0, 1.0]}, "shares"),
]


@pytest.mark.parametrize(("name", "options", "target"), LOSSES)
def test_loss(name, options, target):
    generator = np.random.default_rng(0)
    values = generator.standard_normal((5, 3))
    targets = {
        "classes": generator.integers(0, 3, 5),
        "values": generator.standard_normal((5, 3)),
        "shares": generator.random((5, 3)),
    }[target]
    lists = {key: value for key, value in options.items() if isinstance(value, list)}
    ours = getattr(nn, name)(
        **options | {k: ge.tensor(v, dtype="float64") for k, v in lists.items()}
    )
    theirs = getattr(torch.nn, name)(
        **options | {k: torch.tensor(v, dtype=torch.float64) for k, v in lists.items()}
    )
    x = ge.tensor(values, requires_grad=True)
    x_theirs = torch.tensor(values, requires_grad=True)
    loss, loss_theirs = ours(x, ge.tensor(targets)), theirs(x_theirs, torch.tensor(targets))
    assert_close(loss, loss_theirs)
    loss.sum().backward()
    loss_theirs.sum().backward()
    assert_close(x.grad, x_theirs.grad)
    assert repr(ours) == repr(theirs)
