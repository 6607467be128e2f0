"""Apply a function to every leaf of nested dicts, lists and tuples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradengine.weights.pickle_machine import DEEPEST


def map_tree(function: Callable[[object], object], tree: object) -> Any:
    """Return `tree` with every value that is no dict, list or tuple replaced by `function(value)`.

    Order and sharing are kept: a value that occurs twice is mapped once.
    """
    done: dict[int, object] = {}

    def mapped(value: object, depth: int) -> object:
        if id(value) in done:
            return done[id(value)]
        if depth > DEEPEST:
            raise ValueError(f"containers must nest at most {DEEPEST} deep, none inside itself")
        result: object
        if isinstance(value, dict):
            result = {key: mapped(item, depth + 1) for key, item in value.items()}
        elif isinstance(value, list):
            result = [mapped(item, depth + 1) for item in value]
        elif isinstance(value, tuple):
            result = tuple([mapped(item, depth + 1) for item in value])
        else:
            result = function(value)
        done[id(value)] = result
        return result

    return mapped(tree, 0)
