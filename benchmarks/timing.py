"""Time contestants in turns, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

# OpenMP's and OpenBLAS's threads spin for some milliseconds after a run, in the way of the next
# contestant's: a turn begins after a pause. ONNX Runtime's spin for about 60 ms, and switching that
# off slows it down, so its rows want a longer one.
PAUSE = 0.01
LONG_PAUSE = 0.1
SHORT = 0.05  # seconds: a shorter run is repeated in its turn
WARM = 0.01  # seconds that runs of a turn go untimed before the repeated ones
TURN = 0.02  # seconds that the repeated ones take together, about
ROUNDS = (3, 25)  # at least, even if they take too long; at most


def race(
    runs: dict[str, Callable[[], Any]], seconds: float, pause: float = PAUSE
) -> dict[str, float]:
    """Return the median seconds of every run, from rounds that end after about `seconds`."""
    for run in runs.values():
        run()  # compiles, packs, allocates
    times = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    for number in range(ROUNDS[1]):
        if number >= ROUNDS[0] and time.perf_counter() > end:
            break
        for name, run in runs.items():
            times[name] += take_turn(run, pause)
    return {name: statistics.median(taken) for name, taken in times.items()}


def take_turn(run: Callable[[], Any], pause: float) -> list[float]:
    """Return the seconds of one turn's runs: of one if it is long, else of those after the first.

    The first find caches full of what another contestant left and threads asleep; a program that
    calls a short function again and again does not.
    """
    time.sleep(pause)
    total = last = seconds_of(run)
    if last >= SHORT:
        return [last]
    while total < WARM:
        last = seconds_of(run)
        total += last
    return [seconds_of(run) for _ in range(min(20, 1 + int(TURN / last)))]


def seconds_of(run: Callable[[], Any]) -> float:
    """Return how long one run takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
