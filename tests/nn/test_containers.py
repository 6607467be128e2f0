"""Sequential, ModuleList, ModuleDict."""

from __future__ import annotations

from collections import OrderedDict

import pytest

import gradengine as ge
from gradengine import nn


class Add(nn.Module):
    """Add a number."""

    def __init__(self, amount: int) -> None:
        super().__init__()
        self.amount = amount

    def forward(self, x):
        return x + self.amount


def amounts(container):
    return [module.amount for module in container]


@pytest.mark.parametrize("kind", [nn.Sequential, lambda *modules: nn.ModuleList(modules)])
def test_modules_by_position(kind):
    chain = kind(Add(1), Add(2), Add(3))
    assert len(chain) == 3
    assert chain[0].amount == 1
    assert chain[-1].amount == 3
    chain[1] = Add(20)
    assert amounts(chain) == [1, 20, 3]
    assert chain.append(Add(4)) is chain
    chain.extend([Add(5), Add(6)])
    chain.insert(0, Add(0))
    assert amounts(chain) == [0, 1, 20, 3, 4, 5, 6]
    del chain[2]
    assert amounts(chain) == [0, 1, 3, 4, 5, 6]
    del chain[-2:]
    assert amounts(chain) == [0, 1, 3, 4]
    assert list(chain._modules) == ["0", "1", "2", "3"]
    assert type(chain[1:]) is type(chain)
    assert amounts(chain[1:3]) == [1, 3]
    assert chain[1:][0] is chain[1]
    with pytest.raises(IndexError, match=r"index must be in \[-4, 3\]; got index=4"):
        chain[4]
    with pytest.raises(TypeError, match="cannot assign 'int' as child module '0'"):
        chain[0] = 1  # type: ignore[assignment]


def test_sequential_applies_its_modules_in_order():
    assert nn.Sequential(Add(1), nn.Tanh())(ge.tensor(-1.0)).item() == 0
    assert nn.Sequential()(3) == 3


def test_sequential_with_names():
    chain = nn.Sequential(OrderedDict(first=Add(1), then=Add(2)))
    assert chain.first is chain[0]
    assert list(chain[1:]._modules) == ["then"]
    chain[1] = Add(7)
    assert chain.then.amount == 7


def test_lists_have_no_forward():
    with pytest.raises(NotImplementedError, match=r"Module \[ModuleList\] is missing"):
        nn.ModuleList([Add(1)])(1)


def test_module_dict():
    table = nn.ModuleDict({"a": Add(1), "b": nn.Linear(2, 2)})
    assert list(table) == list(table.keys()) == ["a", "b"]
    assert "a" in table
    assert "c" not in table
    assert len(table) == 2
    assert [key for key, _ in table.items()] == ["a", "b"]
    assert next(iter(table.values())) is table["a"]
    assert [name for name, _ in table.named_parameters()] == ["b.weight", "b.bias"]
    table["c"] = Add(3)
    table.update({"a": Add(10)})
    assert table.pop("c").amount == 3
    del table["b"]
    assert [module.amount for module in table.values()] == [10]
    table.clear()
    assert len(table) == 0
    assert len(nn.ModuleDict()) == 0
