"""`python -m benchmarks.diagnosis`: false alarms and detection of `diagnose`, on synthetic batches.

Writes DIAGNOSIS.md beside this file. The limits of the findings were chosen on seeds below 10,000,
the rates are measured on seeds from there on.
"""

import argparse
import collections
import pathlib
from typing import Any

from benchmarks import synthetic

FIRST_SEED = 10_000
INTRODUCTION = """\
# Rates of `diagnose`

Written by `python -m benchmarks.diagnosis`, on seeds that the limits were not chosen on.

Batches are synthetic, `benchmarks/synthetic.py`: policies over 64 tokens and 2,048 states, peaked,
typical or flat, from which tokens are drawn. Healthy ones vary in size, preset, precision of the
sampler, fields, rewards, tool output and empty rows. They are of a first step or a later one, up to
a KL of about 0.001 nats per token from the sampler. Real batches have correlations that these have
not.
"""
PAGE = pathlib.Path(__file__).parent / "DIAGNOSIS.md"


def healthy(seeds: range, **fixed: Any) -> dict[str, collections.Counter]:
  """Counts findings in healthy batches, by kind of setting: its field and value."""
  found: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  for seed in seeds:
    setting = synthetic.draw_setting(seed, **fixed)
    names = {finding.name for finding in synthetic.make(setting, seed).diagnose().findings}
    size = f"{setting.responses:,} × {setting.length}"
    kinds = ["all", f"responses × length, {size}", f"policy, {setting.policy}"]
    kinds += [f"sampler, {'bfloat16' if setting.bfloat16 else 'float32'}"]
    kinds += [f"preset, {setting.preset}"]
    for kind in kinds:
      found[kind].update(["batches", *names] + ["any"] * bool(names))
  return found


def detected(name: str, seeds: range) -> float:
  """Measures the share of sabotaged batches whose findings have the fault's name."""
  wanted = synthetic.SABOTAGES[name].finding
  hits = 0
  for seed in seeds:
    findings = synthetic.sabotaged(name, seed).diagnose().findings
    hits += wanted in {finding.name for finding in findings}
  return hits / len(seeds)


def main() -> None:
  parser = argparse.ArgumentParser("python -m benchmarks.diagnosis", description=main.__doc__)
  parser.add_argument("--healthy", type=int, default=800, help="healthy batches")
  parser.add_argument("--sabotaged", type=int, default=40, help="batches of each fault")
  parser.add_argument("--first", type=int, default=FIRST_SEED, help="first seed")
  parser.add_argument("--out", type=pathlib.Path, default=PAGE)
  options = parser.parse_args()
  counts = healthy(range(options.first, options.first + options.healthy))
  rates = {}
  for name in synthetic.SABOTAGES:
    rate = detected(name, range(options.first, options.first + options.sabotaged))
    rates[name] = options.sabotaged, rate
    print(f"{name}: {rate:.0%}", flush=True)
  options.out.write_text(page(counts, rates), encoding="utf-8")


def page(counts: dict[str, collections.Counter], rates: dict[str, tuple[int, float]]) -> str:
  """Writes the tables; a rate is the number of batches and the share that was detected."""
  total = counts["all"]
  lines = [
    INTRODUCTION,
    "## False alarms",
    "",
    f"Of {total['batches']:,} healthy batches {total['any']} have a finding, "
    f"{total['any'] / total['batches']:.2%}: " + (alarms(total) or "none") + ".",
    "",
    "| of the batches with | batches | with a finding |",
    "|---|---|---|",
  ]
  kinds = sorted(counts.keys() - {"all"})
  lines += [f"| {kind} | {counts[kind]['batches']:,} | {counts[kind]['any']} |" for kind in kinds]
  lines += [
    "",
    "## Detection",
    "",
    "Batches of 64 to 4,096 responses, otherwise drawn as healthy ones are.",
    "",
    "| fault | finding | batches | detected |",
    "|---|---|---|---|",
  ]
  for name, (batches, rate) in rates.items():
    lines.append(f"| {name} | `{synthetic.SABOTAGES[name].finding}` | {batches} | {rate:.0%} |")
  return "\n".join(lines) + "\n"


def alarms(counts: collections.Counter) -> str:
  """Lists findings with how often they were made."""
  names = sorted(counts.keys() - {"batches", "any"})
  return ", ".join(f"`{name}` {counts[name]}" for name in names)


if __name__ == "__main__":
  main()
