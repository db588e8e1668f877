"""Measures a workload at a size: times side by side, memory, compilation."""

import contextlib
import functools
import sys
from typing import NamedTuple

import jax

from benchmarks import data, linear, logits, loss
from benchmarks.timing import Clock, clock, compiled, interleave, medians
from benchmarks.worker import Worker

WORKLOADS = {"A": loss, "B": logits, "C": linear}


class Options(NamedTuple):
  """How long, how often, and beside whom: an interpreter that has peers, or ""."""

  seconds: float
  least: int
  peers: str


def clocks(workload: str, size: data.Size, only: str) -> tuple[dict[str, Clock], dict]:
  """Gives the clock of one contestant, for a process of its own."""
  function, arguments = WORKLOADS[workload].contestants(size)[only]
  return {only: functools.partial(clock, functools.partial(jax.jit(function), *arguments))}, {}


def _open_peers(stack: contextlib.ExitStack, options: Options, workload: str, size: data.Size):
  """Gives clocks of the peers that run, and why others do not."""
  if not options.peers:
    return {}, {"peers": "no environment; `make bench-peers` makes it"}
  if jax.default_backend() != "cpu":
    return {}, {"peers": "theirs is a CPU environment"}
  try:
    peers = stack.enter_context(Worker(options.peers, "benchmarks.peers", workload, size))
  except (OSError, RuntimeError) as error:
    return {}, {"peers": str(error)}
  return {name: lambda n=name: peers.run(n)["seconds"] for name in peers.names}, peers.skipped


def measure(
  workload: str, size: data.Size, options: Options, only: tuple[str, ...] | None = None
) -> dict:
  """Measures all contestants, or `only` those and no peers."""
  module = WORKLOADS[workload]
  contestants = module.contestants(size)
  mine = {name: compiled(*contestants[name]) for name in only or contestants}
  with contextlib.ExitStack() as stack:
    theirs, skipped = ({}, {}) if only else _open_peers(stack, options, workload, size)
    everyone = {name: run for name, (run, _) in mine.items()} | theirs
    times = interleave(everyone, options.seconds, options.least)
  rows = medians(times, module.UNITS)
  for name, (_, costs) in mine.items():
    rows[name] |= costs
  rows = [{"contestant": name, **row} for name, row in rows.items()]
  return {
    "workload": workload, "title": module.TITLE, "size": size, "rows": rows, "skipped": skipped,
  }  # fmt: skip


def add_peaks(result: dict, options: Options, most: int | None) -> None:
  """Adds the peak of resident memory of one run of each, in a process of its own."""
  for row in result["rows"][:most]:
    ours = "compile_seconds" in row
    python, module = (sys.executable, __name__) if ours else (options.peers, "benchmarks.peers")
    name = row["contestant"]
    with Worker(python, module, result["workload"], result["size"], name) as worker:
      row["peak_bytes"] = worker.run(name)["peak_bytes"]
