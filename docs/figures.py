"""Draws the figure of README: errors of k3 and its gradient in float32, beside the usual forms.

python docs/figures.py
"""

import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import gpo_jax as gpo

HERE = pathlib.Path(__file__).resolve().parent
FORMS = {
  "exp(x) − x − 1": lambda x: jnp.exp(x) - x - 1,
  "expm1(x) − x": lambda x: jnp.expm1(x) - x,
  "gpo_jax": lambda x: gpo.divergences.k3(-x, None, None),
}


def errors(form, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Computes the relative errors of a form's values and derivatives."""
  value, slope = jax.vmap(jax.value_and_grad(form))(jnp.asarray(x))
  wide = x.astype(np.float64)
  small = wide**2 / 2 * (1 + wide / 3 * (1 + wide / 4 * (1 + wide / 5)))
  exact = np.where(wide < 1e-2, small, np.expm1(wide) - wide), np.expm1(wide)
  return tuple(np.abs(np.asarray(f) / e - 1) for f, e in zip((value, slope), exact, strict=True))


def main() -> None:
  """Draws docs/k3.png."""
  x = np.geomspace(1e-6, 1, 3000, dtype=np.float32)
  plt.style.use(HERE.parent / "notebooks/gpo.mplstyle")
  figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True, sharey=True)
  for (name, form), color in zip(FORMS.items(), ("#D55E00", "#E69F00", "#0072B2"), strict=True):
    for panel, error in zip(panels, errors(form, x), strict=True):
      # The largest error among neighbours; what is exact is drawn at the bottom.
      worst = np.maximum(error.reshape(-1, 50).max(1), 1e-8)
      panel.loglog(x[25::50], worst, "-", color=color, label=name)
  for panel, title in zip(panels, ("Value", "Gradient"), strict=True):
    panel.axhline(1, color="0.3", lw=1, ls=":")
    panel.set(title=title, xlabel="|x|, distance of a log-probability", ylim=(1e-8, 1e6))
  panels[0].annotate("no correct digit", (1e-6, 1), xytext=(2, 3), textcoords="offset points")
  panels[0].set_ylabel("largest relative error")
  panels[1].legend(loc="upper right")
  figure.suptitle("The KL penalty k3 in float32")
  figure.savefig(HERE / "k3.png", dpi=120)


if __name__ == "__main__":
  main()
