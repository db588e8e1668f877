"""The picture of a run: accuracy, divergence and clipping against the number of updates."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from gpo_jax.demo.run import REINFORCEMENT, SUPERVISED, Arm, Record

# Okabe and Ito's blue and vermilion: told apart by colour-blind readers, and the dashes in print.
STYLES: dict[str, dict[str, Any]] = {
  REINFORCEMENT: {"color": "#0072B2", "linestyle": "-", "marker": "o", "markersize": 4},
  SUPERVISED: {"color": "#D55E00", "linestyle": "--", "marker": "s", "markersize": 4},
}


def draw(record: Record, path: Path, note: str) -> None:
  """Draws what is recorded, complete or not, with a note below it."""
  figure = Figure(figsize=(12, 8), layout="constrained")
  panels = figure.subplots(2, 2)
  _plot(panels[0, 0], record, "sampled", "Held-out sums, answers sampled", "right (%)", 100)
  _plot(panels[0, 1], record, "greedy", "Held-out sums, likeliest answers", "right (%)", 100)
  _plot(
    panels[1, 0], record, "divergence", "Divergence from the warm start", "KL per answer (nats)"
  )
  _plot_clipped(panels[1, 1], record.arm(REINFORCEMENT), record.config.evaluate_every)
  for axes in panels.flat:
    axes.set_xlabel("updates")
    axes.set_xlim(0, record.config.steps)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
  for axes in (panels[0, 0], panels[1, 1]):
    if axes.lines:
      axes.legend(loc="best")
  state = ", interrupted" if record.interrupted else ""
  title = "Group policy optimization teaches a small transformer to add"
  figure.suptitle(f"{title} (seed {record.config.seed}{state})", size=15)
  figure.supxlabel(note, size=10, color="0.3")
  _save(figure, path)


def _plot(axes: Axes, record: Record, key: str, title: str, label: str, scale: float = 1) -> None:
  axes.set_title(title)
  axes.set_ylabel(label)
  if scale == 100:
    axes.set_ylim(top=103)
  for name, style in STYLES.items():
    if rows := record.arm(name).evaluations:
      values = [scale * row[key] for row in rows]
      axes.plot([row["step"] for row in rows], values, label=name, **style)


def _plot_clipped(axes: Axes, arm: Arm, window: int) -> None:
  axes.set_title("Tokens whose ratio is clipped")
  axes.set_ylabel("clipped (% of tokens)")
  if not arm.updates:
    return
  color = STYLES[arm.name]["color"]
  percent = 100 * np.array([row["clipped"] for row in arm.updates])
  steps = np.arange(1, len(percent) + 1)
  axes.plot(steps, percent, ".", color=color, alpha=0.4, markersize=4, label="each update")
  starts = range(0, len(percent), window)
  ends = [min(start + window, len(percent)) for start in starts]
  means = [percent[start : start + window].mean() for start in starts]
  axes.plot(ends, means, color=color, marker="o", markersize=4, label=f"mean of {window} updates")


def _save(figure: Figure, path: Path) -> None:
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  # With a palette the file is a third of the size.
  image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
  image.quantize(64).save(path, optimize=True)
