"""The picture of a run: accuracy, divergence and clipping against the number of updates."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from .run import Arm, Record

# Okabe and Ito's colours are told apart by colour-blind readers; the dashes and markers in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")


def draw(record: Record, path: Path, note: str) -> None:
  """Draws what is recorded, complete or not, with a note below it."""
  figure = Figure(figsize=(12, 8), layout="constrained")
  panels = figure.subplots(2, 2)
  panels[0, 1].sharey(panels[0, 0])
  _plot(panels[0, 0], record, "sampled", "Held-out sums, answers sampled", "right (%)", 100)
  _plot(panels[0, 1], record, "greedy", "Held-out sums, greedy answers", "right (%)", 100)
  _plot(
    panels[1, 0], record, "divergence", "Divergence from the warm start", "KL per answer (nats)"
  )
  _plot_clipped(panels[1, 1], record)
  for axes in panels.flat:
    axes.set_xlabel("updates")
    axes.set_xlim(0, record.config.steps)
    axes.grid(alpha=0.3)
  for axes in panels[1]:
    axes.set_ylim(bottom=0)
  if panels[0, 0].lines:
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper")
  figure.suptitle(_title(record), size=15)
  figure.supxlabel(note, size=10, color="0.3")
  _save(figure, path)


def style(record: Record, arm: Arm) -> dict[str, Any]:
  """Gives the looks of an arm's curves, of which no two are alike."""
  index = record.config.arms.index(arm.name)
  looks = {"color": COLORS, "linestyle": DASHES, "marker": MARKERS}
  chosen = {name: choices[index % len(choices)] for name, choices in looks.items()}
  return {"label": arm.name, "markersize": 4} | chosen


def _title(record: Record) -> str:
  state = ", interrupted" if record.interrupted else ""
  title = "Group policy optimization teaches a small transformer to add"
  return f"{title} (seed {record.config.seed}{state})"


def _plot(axes: Axes, record: Record, key: str, title: str, label: str, scale: float = 1) -> None:
  axes.set_title(title)
  axes.set_ylabel(label)
  for arm in record.arms.values():
    if rows := arm.evaluations:
      values = [scale * row[key] for row in rows]
      axes.plot([row["step"] for row in rows], values, **style(record, arm))


def _plot_clipped(axes: Axes, record: Record) -> None:
  window = record.config.evaluate_every
  axes.set_title(f"Tokens whose ratio is clipped, mean of {window} updates")
  axes.set_ylabel("clipped (% of tokens)")
  for arm in record.reinforced():
    if arm.updates:
      percent = 100 * np.array([row["clip_fraction"] for row in arm.updates])
      starts = range(0, len(percent), window)
      ends = [min(start + window, len(percent)) for start in starts]
      means = [percent[start : start + window].mean() for start in starts]
      axes.plot(ends, means, **style(record, arm))


def _save(figure: Figure, path: Path) -> None:
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  # With a palette the file is a third of the size.
  image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
  image.quantize(64).save(path, optimize=True)
