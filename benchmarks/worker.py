"""Runs contestants in another process: another interpreter's, or one whose memory is its own.

The process first says what it has, then answers each name on its input by what one run took: lines
of JSON.
"""

import importlib
import json
import os
import pathlib
import re
import resource
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


class Worker:
  """A process that has `module.clocks(workload, size, only)`."""

  def __init__(self, python: str, module: str, workload: str, size: dict, only: str = ""):
    """Starts it and waits until it is ready."""
    command = [python, "-m", "benchmarks.worker", module, workload, json.dumps(size), only]
    # Threads that wait by spinning take the cores from whoever else is there: a hundredfold in
    # torch on a busy machine. Sleeping ones cost it about as much again below a few milliseconds.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    self._process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)
    hello = self._read()
    self.names, self.skipped = hello["names"], hello["skipped"]

  def _read(self) -> dict:
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(f"the process ended with status {self._process.wait()}")
    return json.loads(line)

  def run(self, name: str) -> dict[str, float]:
    """Runs one contestant once: its seconds, and the process's peak of memory so far."""
    print(name, file=self._process.stdin, flush=True)
    return self._read()

  def __enter__(self) -> "Worker":
    return self

  def __exit__(self, *_) -> None:
    self._process.stdin.close()
    self._process.wait()


def peak_bytes() -> int:
  """Gives the peak of resident memory, of this program where the system tells it apart.

  `ru_maxrss` starts from the peak of the program that started this one.
  """
  status = pathlib.Path("/proc/self/status")
  if status.exists():
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
    1 if sys.platform == "darwin" else 1024
  )


def main(module: str, workload: str, size: str, only: str) -> None:
  """Serves; what contestants print goes to the standard error."""
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  clocks, skipped = importlib.import_module(module).clocks(workload, json.loads(size), only)
  print(json.dumps({"names": list(clocks), "skipped": skipped}), file=answers, flush=True)
  for line in sys.stdin:
    answer = {"seconds": clocks[line.strip()](), "peak_bytes": peak_bytes()}
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
