"""State dicts: what they hold, and how strictly they are loaded."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest

import gradengine as ge
from gradengine import nn


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def copied(module: nn.Module) -> OrderedDict[str, ge.Tensor]:
    state = module.state_dict()
    for key in state:
        state[key] = state[key].clone()
    return state


def changed(state):
    """Return the state with other numbers everywhere."""
    for tensor in state.values():
        tensor += 1
    return state


def assert_state(module, state):
    for key, tensor in module.state_dict().items():
        np.testing.assert_array_equal(tensor.array, state[key].array, err_msg=key)


def test_state_dict_shares_memory_off_the_tape():
    module = net()
    state = module.state_dict()
    assert isinstance(state, OrderedDict)
    assert list(state)[:3] == ["0.weight", "0.bias", "1.weight"]
    assert state["0.weight"].array is module[0].weight.array
    assert not state["0.weight"].requires_grad
    assert module.state_dict(keep_vars=True)["0.weight"] is module[0].weight
    assert next(iter(module.state_dict(prefix="model."))) == "model.0.weight"


def test_metadata_gives_versions():
    versions = {"": 1, "0": 1, "1": 2, "2": 1}
    assert net().state_dict()._metadata == {k: {"version": v} for k, v in versions.items()}  # type: ignore[attr-defined]
    assert list(net().state_dict(prefix="m.")._metadata) == ["m", "m.0", "m.1", "m.2"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("convert", [lambda x: x, lambda x: x.array], ids=["tensors", "arrays"])
def test_a_matching_state_is_copied_in(convert):
    module = net()
    arrays = [parameter.array for parameter in module.parameters()]
    state = changed(copied(net()))
    result = module.load_state_dict({key: convert(value) for key, value in state.items()})
    assert repr(result) == str(result) == "<All keys matched successfully>"
    assert result == ([], [])
    assert_state(module, state)
    assert all(a is p.array for a, p in zip(arrays, module.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_loading_converts_to_the_modules_dtype():
    module = net()
    state = {key: np.asarray(value.array, np.float64) for key, value in copied(net()).items()}
    module.load_state_dict(state)
    assert module[0].weight.dtype == ge.float32
    assert module[1].num_batches_tracked.dtype == ge.int64


def test_a_load_is_noticed_by_the_tape():
    module = nn.Linear(3, 3)
    loss = module(module(ge.ones(1, 3))).sum()
    module.load_state_dict(copied(module))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def broken(state, **changes):
    for key, value in changes.items():
        key = key.replace("_", ".", 1)
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


FAULTS = {
    "missing": (
        {"0_weight": None, "1_running_var": None},
        r'Missing key\(s\) in state_dict: "0.weight", "1.running_var"',
    ),
    "unexpected": (
        {"3_weight": ge.ones(1, device="cpu")},
        r'Unexpected key\(s\) in state_dict: "3.weight"',
    ),
    "shape": (
        {"2_weight": ge.ones((5, 4), device="cpu")},
        r"size mismatch for 2.weight: copying a param with shape \(5, 4\) from checkpoint, "
        r"the shape in current model is \(2, 4\)",
    ),
    "broadcast": (
        {"0_bias": ge.ones((1,), device="cpu")},
        r"size mismatch for 0.bias: .* shape \(1,\)",
    ),
    "kind": (
        {"0_bias": [1.0, 2.0]},
        'while copying "0.bias": expected a Tensor or an array .* got list',
    ),
    "complex": ({"0_bias": np.ones(4, np.complex64)}, 'while copying "0.bias": expected'),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_refused_load_changes_nothing(fault):
    module = net()
    before = copied(module)
    changes, message = FAULTS[fault]
    state = broken(changed(copied(net())), **changes)
    with pytest.raises(RuntimeError, match=message) as caught:
        module.load_state_dict(state)
    assert str(caught.value).startswith("Error(s) in loading state_dict for Sequential:\n\t")
    assert_state(module, before)


def test_all_faults_are_listed_at_once():
    state = broken(
        copied(net()),
        **{"0_weight": None, "9_x": ge.ones(1), "2_weight": ge.ones(5, 4), "2_bias": ge.ones(5)},
    )
    with pytest.raises(RuntimeError) as caught:
        net().load_state_dict(state)
    lines = str(caught.value).split("\n\t")
    assert lines[1] == 'Missing key(s) in state_dict: "0.weight".'
    assert lines[2] == 'Unexpected key(s) in state_dict: "9.x".'
    assert [line.partition(":")[0] for line in lines[3:]] == [
        "size mismatch for 2.weight",
        "size mismatch for 2.bias",
    ]


def test_without_strict_keys_may_differ_but_not_shapes():
    module = net()
    state = broken(changed(copied(module)), **{"0_weight": None, "9_x": ge.ones(1)})
    kept = module[0].weight.array.copy()
    result = module.load_state_dict(state, strict=False)
    assert result.missing_keys == ["0.weight"]
    assert result.unexpected_keys == ["9.x"]
    assert repr(result) == "_IncompatibleKeys(missing_keys=['0.weight'], unexpected_keys=['9.x'])"
    np.testing.assert_array_equal(module[0].weight.array, kept)
    np.testing.assert_array_equal(module[0].bias.array, state["0.bias"].array)
    before = copied(module)
    state["2.bias"] = ge.ones(3)
    with pytest.raises(RuntimeError, match="size mismatch for 2.bias") as caught:
        module.load_state_dict(state, strict=False)
    assert "key(s)" not in str(caught.value)
    assert_state(module, before)


def test_a_state_must_be_a_dict():
    with pytest.raises(TypeError, match="expected state_dict to be dict-like; got list"):
        net().load_state_dict([1, 2])


def test_assign_takes_the_memory_over():
    module = net()
    parameters = list(module.parameters())
    module(ge.ones(2, 3)).sum().backward()
    state = {
        key: value.double() if value.is_floating_point() else value
        for key, value in copied(net()).items()
    }
    module.load_state_dict(state, assign=True)
    assert module[0].weight.array is state["0.weight"].array
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    assert module[0].weight.grad is None
    module(ge.ones(2, 3, dtype="float64")).sum().backward()
    assert module[0].weight.grad.dtype == ge.float64
    state["0.weight"] = ge.ones(4, 3, dtype="int64")
    with pytest.raises(RuntimeError, match="dtype mismatch for 0.weight: cannot assign int64"):
        module.load_state_dict(state, assign=True)


def test_files_of_old_batch_norms_load_strictly():
    module = net()
    with ge.no_grad():
        module[1].num_batches_tracked += 7
    state = dict(copied(net()))
    del state["1.num_batches_tracked"]
    module.load_state_dict(state)
    assert module[1].num_batches_tracked.item() == 0
    assert "1.num_batches_tracked" not in state  # the caller's dict is left alone


def test_a_new_file_must_have_the_count():
    state = copied(net())
    del state["1.num_batches_tracked"]
    with pytest.raises(RuntimeError, match='Missing key.*"1.num_batches_tracked"'):
        net().load_state_dict(state)


def test_shared_parameters_are_loaded_under_every_name():
    module = net()
    module.tied = module[0].weight
    state = copied(module)
    assert "tied" in state
    module.load_state_dict(state)
    del state["tied"]
    with pytest.raises(RuntimeError, match='Missing key.*"tied"'):
        module.load_state_dict(state)
