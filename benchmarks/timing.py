"""Times functions side by side: interleaved rounds in one process, medians."""

import statistics
import time
from collections.abc import Callable, Mapping

import jax


def interleave(
  contestants: Mapping[str, Callable[[], object]], seconds: float = 20.0, least: int = 7
) -> dict[str, float]:
  """Calls each contestant in turn, round after round, and returns their median times in seconds.

  Args:
    contestants: functions of no argument, by name; each returns JAX arrays or something finished.
    seconds: how long to go on, warm-up not counted.
    least: how many rounds there are at least.

  Returns:
    The median time of each.
  """
  for run in contestants.values():
    for _ in range(3):
      jax.block_until_ready(run())
  times = {name: [] for name in contestants}
  start = time.perf_counter()
  while time.perf_counter() - start < seconds or len(times[next(iter(times))]) < least:
    for name, run in contestants.items():
      before = time.perf_counter()
      jax.block_until_ready(run())
      times[name].append(time.perf_counter() - before)
  return {name: statistics.median(values) for name, values in times.items()}


def table(title: str, times: Mapping[str, float], unit: str) -> str:
  """Lays out times as Markdown, each beside its ratio to the contestant named `unit`."""
  rows = [f"### {title}", "", f"| contestant | median | of {unit} |", "|---|---|---|"]
  rows += [
    f"| {name} | {1e3 * time:.3f} ms | {time / times[unit]:.2f} |" for name, time in times.items()
  ]
  return "\n".join(rows)
