"""Time contestants in turns, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

PAUSE = 0.005  # seconds before a turn: threads of the contestant before it stop spinning meanwhile
SHORT = 0.05  # seconds: a shorter run is made once untimed in its turn, then repeated
TURN = 0.02  # seconds that the repeated runs of one turn take together, about
ROUNDS = (3, 25)  # at least, even if they take too long; at most


def race(runs: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Return the median seconds of every run, from rounds that end after about `seconds`."""
    for run in runs.values():
        run()  # compiles, packs, allocates
    times = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    for number in range(ROUNDS[1]):
        if number >= ROUNDS[0] and time.perf_counter() > end:
            break
        for name, run in runs.items():
            times[name] += take_turn(run)
    return {name: statistics.median(taken) for name, taken in times.items()}


def take_turn(run: Callable[[], Any]) -> list[float]:
    """Return the seconds of one turn's runs: of one if it is long, else of those after the first.

    The first finds caches full of what another contestant left and threads asleep; a program that
    calls a short function again and again does not.
    """
    time.sleep(PAUSE)
    first = seconds_of(run)
    if first >= SHORT:
        return [first]
    return [seconds_of(run) for _ in range(min(20, 1 + int(TURN / first)))]


def seconds_of(run: Callable[[], Any]) -> float:
    """Return how long one run takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
