"""Generators of random numbers, and the process's own under PyTorch's names.

A number depends on the generator's seed and on how many were drawn before it, on nothing else: CPU and
GPUs, any number of threads (`set_num_threads`) and steps captured as CUDA graphs draw the same ones,
bit for bit.

All threads of a process share its generator. Each number is given to one of them; to which one depends
on who asks first. What is to be the same in every run is drawn by one thread, or by each thread from a
`Generator` of its own. A process that is forked starts with a copy: give it another seed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gradengine import devices
from gradengine.ops import random as streams
from gradengine.tensor import Tensor

__all__ = [
    "Generator",
    "default_generator",
    "fork_rng",
    "get_rng_state",
    "initial_seed",
    "manual_seed",
    "seed",
    "set_rng_state",
]


class Generator:
    """A stream of random numbers: `ge.rand(3, generator=generator)`.

    It serves every device; `device` is there for PyTorch's sake. It starts from the same seed always.
    """

    def __init__(self, device: Any = "cpu") -> None:
        self.device = devices.device(device)
        self.stream = streams.Stream()

    def manual_seed(self, seed: int) -> Generator:
        """Start anew from a seed of 64 bits, and return the generator.

        A negative seed stands for seed + 2^64. Raises ValueError where 64 bits do not hold it.
        """
        self.stream.start(seed)
        return self

    def seed(self) -> int:
        """Start anew from a seed that the system draws, and return it."""
        drawn = int.from_bytes(os.urandom(8), "little")
        self.stream.start(drawn)
        return drawn

    def initial_seed(self) -> int:
        """Return the seed."""
        return self.stream.seed

    def get_state(self) -> Tensor:
        """Return seed and position as a uint8 tensor of 16 elements on the CPU."""
        return Tensor(self.stream.state())

    def set_state(self, state: Any) -> None:
        """Continue from what `get_state` returned. Raises ValueError for anything else."""
        self.stream.restore(state)


default_generator = Generator()
default_generator.stream = streams.default


def manual_seed(seed: int) -> Generator:
    """Start the process's random numbers anew from a seed of 64 bits, on all devices.

    A negative seed stands for seed + 2^64. Raises ValueError where 64 bits do not hold it.
    """
    return default_generator.manual_seed(seed)


def seed() -> int:
    """Start the process's random numbers anew from a seed that the system draws, and return it."""
    return default_generator.seed()


def initial_seed() -> int:
    """Return the seed of the process's random numbers."""
    return default_generator.initial_seed()


def get_rng_state() -> Tensor:
    """Return the state of the process's random numbers, a uint8 tensor, for `set_rng_state`."""
    return default_generator.get_state()


def set_rng_state(state: Any) -> None:
    """Continue the process's random numbers from what `get_rng_state` returned.

    Raises ValueError for anything else.
    """
    default_generator.set_state(state)


@contextmanager
def fork_rng() -> Iterator[None]:
    """Draw within the block as one likes: behind it the process's random numbers go on as without it."""
    state = streams.default.state()
    try:
        yield
    finally:
        streams.default.restore(state)
