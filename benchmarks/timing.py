"""Times functions side by side: interleaved rounds, medians."""

import functools
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

Clock = Callable[[], float]


def clock(run: Callable[[], Any]) -> float:
  """Runs to the end and gives the seconds."""
  before = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - before


def compiled(function: Callable, arguments: tuple) -> tuple[Clock, dict[str, float]]:
  """Compiles, and gives a clock of it and what the compiler says of it."""
  before = time.perf_counter()
  executable = jax.jit(function).lower(*arguments).compile()
  seconds = time.perf_counter() - before
  memory = executable.memory_analysis()
  costs = {
    "compile_seconds": seconds,
    "temporary_bytes": memory.temp_size_in_bytes,
    "output_bytes": memory.output_size_in_bytes,
  }
  # Called through `jit`: an executable's own call has an overhead that small ones would show.
  return functools.partial(clock, functools.partial(jax.jit(function), *arguments)), costs


def interleave(clocks: Mapping[str, Clock], seconds: float, least: int) -> dict[str, list[float]]:
  """Runs each once per round, in another order each time, and returns the seconds of all runs.

  What runs after something slow finds a cool chip, so no order may be fixed.

  Args:
    clocks: functions that run something once and return its seconds, by name.
    seconds: how long to go on, warm-up not counted.
    least: how many rounds there are at least.

  Returns:
    The seconds of each, one per round.
  """
  for run in clocks.values():
    run()
  times: dict[str, list[float]] = {name: [] for name in clocks}
  start, rounds, order = time.perf_counter(), 0, random.Random(0)
  while time.perf_counter() - start < seconds or rounds < least:
    for name in order.sample(list(clocks), len(clocks)):
      times[name].append(clocks[name]())
    rounds += 1
  return times


def medians(times: Mapping[str, list[float]], units: tuple[str, ...]) -> dict[str, dict]:
  """Gives for each its median time and its ratio to those of `units`."""
  middle = {name: statistics.median(values) for name, values in times.items()}
  return {
    name: {
      "seconds": value,
      "ratios": {unit: value / middle[unit] for unit in units},
      "rounds": len(times[name]),
    }
    for name, value in middle.items()
  }
