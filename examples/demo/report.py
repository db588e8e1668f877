"""The report of a run: the table, a few answers, the metrics file."""

import dataclasses
import json
from pathlib import Path

from . import task
from .config import SUPERVISED, Config
from .picture import draw
from .run import Arm, Record

TERMS = "All start from one warm-started policy and make as many updates, on as many answers.\n"
SHOWN = "The supervised arm is shown the right answers; the other hears which of its own are right."
RECIPE = """\
The policy of one update ago gives the answers, where some objectives assume the current one.
Learning rate and batch were tuned for gpo, not for the others: this is no ranking."""


def write(record: Record, folder: Path) -> None:
  """Writes the picture and the metrics into a folder; prints the summary and where they are."""
  picture, metrics = folder / "learning.png", folder / "metrics.json"
  draw(record, picture, terms(record.config))
  metrics.write_text(json.dumps(as_dict(record), indent=1) + "\n")
  print(f"\n{summary(record)}\nPicture: {picture}\nMetrics: {metrics}")


def terms(config: Config) -> str:
  """Says on which terms the arms of a run are compared."""
  return TERMS + (SHOWN if SUPERVISED in config.arms else RECIPE)


def improved(arm: Arm) -> bool:
  """Tells whether an arm raised the held-out sampled accuracy."""
  rows = arm.evaluations
  return bool(rows) and rows[-1]["sampled"] > rows[0]["sampled"]


def examples(record: Record, count: int = 3) -> list[dict[str, str]]:
  """Gives the first held-out sums that the warm start got wrong, and the first arm's answers."""
  answers = record.reinforced()[0].answers
  if not answers:
    return []
  prompts, right = task.PROMPTS[record.held_out], task.ANSWERS[record.held_out]
  columns = (map(task.decode, column) for column in (prompts, answers[0], answers[-1], right))
  names = ("prompt", "before", "after", "right")
  rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
  return [row for row in rows if row["before"] != row["right"]][:count]


def summary(record: Record) -> str:
  """Writes before and after of each arm as a table, then the examples."""
  lines = [
    "Held-out accuracy          sampled              greedy",
    "                       before    after      before    after      time",
  ]
  for arm in record.arms.values():
    if arm.evaluations:
      first, last = arm.evaluations[0], arm.evaluations[-1]
      values = (first["sampled"], last["sampled"], first["greedy"], last["greedy"])
      cells = "{:>10.1%}{:>9.1%}{:>12.1%}{:>9.1%}".format(*values)
      lines.append(f"{arm.name:<19}{cells}{arm.seconds():>8.0f} s")
  lines.append(terms(record.config))
  if rows := examples(record):
    name = record.reinforced()[0].name
    lines += ["", f"Sums the warm start got wrong, before and after {name}; last digit first:"]
  lines += ["  {prompt}  before {before:<6}after {after:<6}right {right}".format(**r) for r in rows]
  return "\n".join(lines) + "\n"


def as_dict(record: Record) -> dict[str, object]:
  """Gives the configuration, the results, the timings and the history, ready for JSON."""
  arms = record.arms.values()
  seconds = {arm.name: arm.seconds() for arm in arms}
  results = {
    arm.name: {"before": arm.evaluations[0], "after": arm.evaluations[-1]}
    for arm in arms
    if arm.evaluations
  }
  history = {arm.name: {"updates": arm.updates, "evaluations": arm.evaluations} for arm in arms}
  return {
    "config": dataclasses.asdict(record.config),
    "interrupted": record.interrupted,
    "results": results,
    "examples": examples(record),
    "seconds": seconds | {"total": sum(seconds.values())},
    "history": history,
  }
