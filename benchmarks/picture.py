"""Draws time and memory against the size of the vocabulary."""

import pathlib

from benchmarks import linear

# Okabe and Ito's, which the colour-blind tell apart; markers differ too.
STYLES = {
  linear.LINES[0]: {"color": "#D55E00", "marker": "s", "linestyle": "--"},
  linear.LINES[1]: {"color": "#56B4E9", "marker": "^", "markersize": 13, "linestyle": "-"},
  linear.LINES[2]: {"color": "#0072B2", "marker": "o", "linestyle": "-"},
}


def _points(results: list[dict], name: str, value) -> list[tuple[int, float]]:
  rows = ((r["size"]["vocabulary"], row) for r in results for row in r["rows"])
  return sorted((size, value(row)) for size, row in rows if row["contestant"] == name)


def _panel(axes, results: list[dict], value, title: str, unit: str) -> None:
  for name, style in STYLES.items():
    axes.plot(
      *zip(*_points(results, name, value), strict=True),
      label=name.replace("plain path", "logits in memory"),
      **style,
    )
  ticks = sorted(r["size"]["vocabulary"] for r in results)
  axes.set_xticks(ticks, [f"{size:,}" for size in ticks], fontsize=11)
  axes.set_xlabel("size of the vocabulary")
  axes.set_ylabel(unit)
  axes.margins(y=0.1)
  axes.set_ylim(bottom=0)
  axes.set_title(title, fontsize=13)
  axes.grid(alpha=0.3)


def draw(results: list[dict], path: pathlib.Path) -> None:
  """Draws the results of workload C at the first width."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  width = results[0]["size"]["hidden"]
  results = [r for r in results if r["size"]["hidden"] == width]
  with plt.rc_context({"font.size": 12, "lines.linewidth": 2, "lines.markersize": 8}):
    figure, (time, memory) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    _panel(
      time,
      results,
      lambda row: row["ratios"]["matmul3"],
      "Time",
      "time / that of the matrix products",
    )
    time.axhline(1, color="0.4", linewidth=1)
    _panel(memory, results, lambda row: row["temporary_bytes"] / 1e6, "Temporary memory", "MB")
    size = results[0]["size"]
    tokens = f"{size['rows']} × {size['tokens']} tokens, width {width}"
    figure.suptitle(f"GRPO loss and gradients from hidden states: {tokens}")
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
