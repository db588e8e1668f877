"""The figure of a diagnosis."""

import importlib
import io
from typing import Any

import numpy as np

from gpo_jax.diagnosis.evidence import POLICIES, Evidence

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLORS = dict(zip(POLICIES[1:], ("#0072B2", "#D55E00", "#009E73"), strict=True))
SHOWN = 4000  # points of a scatter plot


def draw(batch: Evidence, title: str) -> Any:
  """Draws log-probabilities against each other, by lag and apart, and advantages by length."""
  try:
    figure_module: Any = importlib.import_module("matplotlib.figure")
  except ImportError as error:
    raise ImportError(f"plot needs matplotlib: pip install matplotlib ({error})") from error

  class Shown(figure_module.Figure):
    """A figure that notebooks show before anything has been drawn by pyplot."""

    def _repr_png_(self) -> bytes:
      buffer = io.BytesIO()
      self.savefig(buffer, format="png")
      return buffer.getvalue()

  figure = Shown(figsize=(9, 6.5), layout="constrained")
  (values, lags), (ratios, lengths) = figure.subplots(2, 2)
  others = [name for name in POLICIES[1:] if _has(batch, name)]
  for name in others:
    pair, style = batch.pair(name), {"color": COLORS[name], "label": name}
    some = slice(None, None, -(-pair.values.size // SHOWN))
    values.scatter(pair.base_values[some], pair.values[some], s=4, alpha=0.4, lw=0, **style)
    apart = [(lag, pair.apart(lag)) for lag in range(-3, 4)]
    apart = [(lag, np.nanmean(x)) for lag, x in apart if not np.isnan(x).all()]
    lags.plot(*zip(*apart, strict=True), marker="o", **style)
    ratios.hist(np.clip(-pair.difference, -20, 20), 61, histtype="step", lw=1.6, **style)
  low = min(np.min(batch.logs[name][batch.usable[name]]) for name in ("log_probs", *others))
  values.plot([low, 0], [low, 0], color="0.6", lw=1, zorder=0)
  values.set(title="Same token, two policies", xlabel="log_probs", ylabel="nats")
  lags.set(title="Distance from log_probs", xlabel="lag (tokens)", ylabel="mean |Δ| (nats)")
  lags.set_ylim(bottom=0)
  ratios.set(title="log_probs − other", xlabel="nats", ylabel="tokens", yscale="log")
  mean = batch.mean(batch.advantages)
  lengths.scatter(batch.lengths, mean, s=12, c=np.where(mean == 0, "0.7", "k"), lw=0)
  lengths.axhline(0, color="0.6", lw=1, zorder=0)
  lengths.set(title="Responses; grey: advantage 0", xlabel="tokens", ylabel="advantage")
  if others:
    figure.legend(*lags.get_legend_handles_labels(), loc="outside lower center", ncols=3)
  figure.suptitle(title)
  return figure


def _has(batch: Evidence, name: str) -> bool:
  return name in batch.logs and bool((batch.usable[name] & batch.usable["log_probs"]).any())
