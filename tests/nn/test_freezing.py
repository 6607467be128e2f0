"""Freezing: by freeze(), by hand with its warning, and the audit of what moved."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest

import gradengine as ge
from gradengine import functional as F
from gradengine import nn, optim


def net() -> nn.Sequential:
    ge.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def batch() -> ge.Tensor:
    return ge.randn(6, 2, 5, 5)


def train(model, steps=3):
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(batch()), ge.tensor([0, 1, 2, 0, 1, 2])).backward()
        optimizer.step()


def arrays(model):
    return {name: tensor.array.copy() for name, tensor in model.state_dict().items()}


def moved(before, model):
    return [
        name for name, array in arrays(model).items() if not np.array_equal(array, before[name])
    ]


def test_freeze_keeps_everything_in_training_mode_too():
    model = net()
    assert model.freeze() is model
    model[4].unfreeze()
    before = arrays(model)
    train(model)
    assert moved(before, model) == ["4.weight", "4.bias"]


def test_a_frozen_batch_norm_normalizes_by_its_running_statistics():
    layer = nn.BatchNorm2d(2).freeze()
    x = ge.randn(4, 2, 3, 3) + 5
    frozen = layer.train()(x)
    np.testing.assert_array_equal(frozen.array, layer.eval()(x).array)
    assert layer.num_batches_tracked.item() == 0
    assert "fixed=True" in repr(layer)


def test_unfreeze_undoes_it():
    model = net().freeze()
    assert model.unfreeze() is model
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = arrays(model)
    train(model)
    assert set(moved(before, model)) >= {"1.running_mean", "1.num_batches_tracked", "0.weight"}


def test_integer_parameters_never_train():
    layer = nn.Identity()
    layer.table = nn.Parameter(ge.arange(3), requires_grad=False)
    layer.freeze().unfreeze()
    assert not layer.table.requires_grad


def test_freeze_drops_gradients_that_an_optimizer_would_follow():
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    model(batch()).sum().backward()
    before = arrays(model.freeze())
    optimizer.step()
    assert moved(before, model) == []


def test_a_frozen_model_stays_so_when_copied():
    model = copy.deepcopy(net().freeze())
    before = arrays(model)
    model(batch())
    assert moved(before, model) == []


# ---- by hand -------------------------------------------------------------------------------------


def frozen_by_hand() -> nn.Sequential:
    model = net()
    for layer in model[:4]:
        layer.requires_grad_(False)
    return model


def test_freezing_by_hand_lets_statistics_move_and_says_so_once():
    model = frozen_by_hand()
    before = arrays(model)
    with pytest.warns(
        UserWarning, match="still moves their running statistics: 1, 2.1; call freeze"
    ) as caught:
        model(batch())
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert moved(before, model) == [
        *("1.running_mean", "1.running_var", "1.num_batches_tracked"),
        *("2.1.running_mean", "2.1.running_var", "2.1.num_batches_tracked"),
    ]
    train(model)  # warnings are errors here: it does not come again


def test_the_warning_names_layers_from_the_outermost_module_that_is_called():
    class Trainer(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x)

    trainer = Trainer(frozen_by_hand())
    with pytest.warns(UserWarning, match=r"statistics: model\.1, model\.2\.1;"):
        trainer(batch())
    other = nn.Sequential(nn.BatchNorm2d(2)).requires_grad_(False)
    trainer.forward = other.__call__  # called inside trainer, but no part of it
    with pytest.warns(UserWarning, match="statistics: 0;"):
        trainer(batch())
    with pytest.warns(UserWarning, match="statistics: BatchNorm2d;"):
        nn.BatchNorm2d(2).requires_grad_(False)(batch())


@pytest.mark.parametrize(
    "prepare",
    [
        lambda model: model.eval(),
        lambda model: model.freeze(),
        lambda model: model.requires_grad_(True),
        lambda model: [layer.weight.requires_grad_(True) for layer in (model[1], model[2][1])],
    ],
    ids=["eval", "freeze", "trained", "partly"],
)
def test_no_warning_where_nothing_moves_unasked(prepare):
    model = frozen_by_hand()
    prepare(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(batch())


def test_no_warning_for_batch_norm_without_parameters():
    nn.BatchNorm2d(2, affine=False)(batch())


# ---- audit ---------------------------------------------------------------------------------------


def test_audit_names_what_is_frozen():
    model = net()
    model[:4].freeze()
    model[2][0].bias.requires_grad = True
    audit = nn.audit_frozen(model)
    assert audit.names == [
        *("0.weight", "0.bias", "1.weight", "1.bias"),
        *("1.running_mean", "1.running_var", "1.num_batches_tracked"),
        *("2.0.weight", "2.1.weight", "2.1.bias"),
        *("2.1.running_mean", "2.1.running_var", "2.1.num_batches_tracked"),
    ]
    train(model)
    assert audit.moved() == []


def test_audit_finds_statistics_that_moved():
    model = frozen_by_hand()
    audit = nn.audit_frozen(model)
    with pytest.warns(UserWarning, match="running statistics"):
        train(model)
    assert audit.moved() == [
        *("1.running_mean", "1.running_var", "1.num_batches_tracked"),
        *("2.1.running_mean", "2.1.running_var", "2.1.num_batches_tracked"),
    ]


def test_audit_finds_single_bits_and_removed_layers():
    model = net().freeze()
    audit = nn.audit_frozen(model)
    weight = model[0].weight.array
    weight[0, 0, 0, 0] = np.nextafter(weight[0, 0, 0, 0], np.float32(np.inf))
    del model[4]
    assert audit.moved() == ["0.weight", "4.weight", "4.bias"]


def test_audit_as_a_block():
    model = net().freeze()
    with nn.audit_frozen(model) as audit:
        train(nn.Sequential(model, nn.Linear(3, 3)))
    assert audit.moved() == []
    with (
        pytest.raises(RuntimeError, match="frozen tensors have moved; got 4.bias"),
        nn.audit_frozen(model),
    ):
        model[4].bias.array += 1
    audit = nn.audit_frozen(model)
    model[4].bias.array += 1
    with pytest.raises(KeyError), audit:  # an error inside is not hidden
        raise KeyError


def test_audit_of_buffers_without_parameters():
    layer = nn.BatchNorm2d(2, affine=False)
    assert nn.audit_frozen(layer).names == []
    assert nn.audit_frozen(layer.freeze()).names == [
        "running_mean",
        "running_var",
        "num_batches_tracked",
    ]
