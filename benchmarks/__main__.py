"""`python -m benchmarks`: prints tables; writes `results.json` and a picture.

What is beside this file was written by `--out benchmarks`, and RESULTS.md holds its tables.
"""

import argparse
import json
import os
import pathlib
import platform

import jax

from benchmarks import accuracy, linear, picture, report
from benchmarks.measure import WORKLOADS, Options, add_peaks, measure

PEERS = pathlib.Path(__file__).parent.parent / ".venv-peers" / "bin" / "python"


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser("python -m benchmarks", description="Side-by-side timings.")
  parser.add_argument("--only", default="A,B,C,D", help="workloads, like A,C")
  parser.add_argument("--seconds", type=float, default=60.0, help="at least, for each table")
  parser.add_argument("--least", type=int, default=3, help="rounds of each table")
  parser.add_argument("--quick", action="store_true", help="small sizes: whether it works")
  parser.add_argument("--peers", default=str(PEERS) if PEERS.exists() else "", help="interpreter")
  parser.add_argument(
    "--out", type=pathlib.Path, default=pathlib.Path("bench-output"), help="where files go"
  )
  args = parser.parse_args()
  args.only = args.only.split(",")
  if unknown := set(args.only) - {*WORKLOADS, "D"}:
    parser.error(f"--only takes {', '.join(WORKLOADS)} and D; got {', '.join(sorted(unknown))}")
  return args


def machine() -> dict[str, str]:
  device = jax.devices()[0]
  return {
    "device": f"{device.device_kind} ({device.platform})",
    "cores": str(os.cpu_count()),
    "python": platform.python_version(),
    "jax": jax.__version__,
  }


def run(workload: str, options: Options, quick: bool) -> list[dict]:
  """Measures a workload at all its sizes and prints each table as soon as it is there."""
  module = WORKLOADS[workload]
  results = []
  for size in module.QUICK if quick else module.SIZES:
    result = measure(workload, size, options)
    if workload != "A":
      add_peaks(result, options, 2 if quick else None)
    print(report.measured(result), end="\n\n", flush=True)
    results.append(result)
  return results


def scaling(options: Options, quick: bool) -> list[dict]:
  """Measures what else the picture needs."""
  sizes = linear.MORE_QUICK if quick else linear.MORE_SIZES
  return [measure("C", size, options, (*linear.UNITS, *linear.LINES)) for size in sizes]


def main() -> None:
  args = arguments()
  options = Options(args.seconds, args.least, args.peers)
  output = {"machine": machine(), "results": []}
  print(", ".join(f"{name} {value}" for name, value in output["machine"].items()), end="\n\n")
  for workload in WORKLOADS:
    if workload in args.only:
      output["results"] += run(workload, options, args.quick)
  if "D" in args.only:
    output["accuracy"] = accuracy.rows()
    print(report.accuracy(output["accuracy"]))
  args.out.mkdir(parents=True, exist_ok=True)
  if "C" in args.only:
    output["scaling"] = scaling(options, args.quick)
    of_c = [result for result in output["results"] if result["workload"] == "C"]
    picture.draw(of_c + output["scaling"], args.out / "results.png")
  (args.out / "results.json").write_text(json.dumps(output, indent=1) + "\n")


if __name__ == "__main__":
  main()
