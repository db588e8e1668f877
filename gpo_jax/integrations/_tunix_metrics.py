"""The metrics that Tunix's learners look up beside the loss."""

import jax
import jax.numpy as jnp

from gpo_jax import weightings
from gpo_jax.metrics import summarize
from gpo_jax.types import Rollout, Terms


def tunix_metrics(terms: Terms, rollout: Rollout) -> dict[str, jax.Array]:
  """Adds to `summarize` what Tunix's learners log, by their names; the loss they log themselves."""
  metrics, mask = summarize(terms, rollout), rollout.mask
  del metrics["loss"]
  share = weightings.token_mean(mask)
  one, kl = jnp.ones_like(terms.loss), terms.divergence
  factor = one if rollout.factor is None else rollout.factor
  policy = terms.surrogate * (one if terms.factor is None else terms.factor)
  advantages = one * rollout.advantages
  by_token = {
    "kl": one - one if kl is None else kl,
    "ppo_kl": -terms.token_log_ratio,
    "log_ratio/abs_mean": jnp.abs(terms.log_ratio),
    "pg_loss/unclipped_mean": -advantages * jnp.exp(terms.log_ratio),
    "pg_loss/clipped_mean": -terms.surrogate,
    "advantage/abs_mean": jnp.abs(advantages),
    "advantage/nonzero_frac": jnp.where(advantages == 0, 0, one),
    "sampler_is/weight_mean": factor,
  }
  metrics |= {name: jnp.sum(share * x, where=mask) for name, x in by_token.items()}
  metrics |= {f"is_ratio/{name}": metrics[f"ratio_{name}"] for name in ("mean", "max", "min")}
  return metrics | {
    "pg_loss": -jnp.sum(rollout.weights * policy, where=mask),
    "kl_loss": metrics.get("divergence", jnp.zeros(())),
    "pg_clipfrac": metrics["clip_fraction"],
    "advantage/max": jnp.max(advantages, where=mask, initial=-jnp.inf),
    "advantage/min": jnp.min(advantages, where=mask, initial=jnp.inf),
    "sampler_is/weight_min": jnp.min(factor, where=mask, initial=jnp.inf),
  }
