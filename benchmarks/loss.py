"""A: loss and gradient from log-probabilities, beside plain autodiff of the textbook formula."""

import jax
import jax.numpy as jnp

import gpo_jax as gpo
from benchmarks import data

TITLE = "A. GRPO loss and gradient from log-probabilities, 30 % padding"
UNITS = ("textbook, plain autodiff", "gpo_jax")
SIZES = [{"rows": 64, "tokens": 1024}, {"rows": 512, "tokens": 2048}]
QUICK = [{"rows": 8, "tokens": 64}]
PADDING = 0.3


def textbook(log_probs, old, ref, advantages, mask):
  """GRPO as a paper prints it; padding holds finite numbers here, which is all it can bear."""
  ratio = jnp.exp(log_probs - old)
  clipped = jnp.clip(ratio, 0.8, 1.2)
  surrogate = jnp.minimum(ratio * advantages, clipped * advantages)
  k3 = jnp.exp(ref - log_probs) - (ref - log_probs) - 1
  per_token = 0.04 * k3 - surrogate
  return jnp.mean(jnp.sum(per_token * mask, -1) / jnp.maximum(jnp.sum(mask, -1), 1))


def floor(log_probs, old, ref, advantages, mask):
  """Reads what a loss must read and writes what its gradient must write."""
  return log_probs + old + ref + advantages * mask


def loss(log_probs, objective, rollout):
  return objective(log_probs, rollout)[0]


def loss_and_metrics(log_probs, objective, rollout):
  value, terms = objective(log_probs, rollout)
  return value, gpo.summarize(terms, rollout)


def grouped(x) -> jax.Array:
  """Shapes `[rows, …]` as `[prompts, 8, …]`."""
  return jnp.asarray(x).reshape(-1, 8, *x.shape[1:])


def prepare(objective: gpo.Objective, batch: data.Batch) -> gpo.Rollout:
  """Prepares what an objective needs."""
  rewards, mask, old, ref = map(grouped, (batch.rewards, batch.mask, batch.old, batch.ref))
  return objective.prepare(rewards, mask, old, ref_log_probs=ref)


def contestants(size: data.Size) -> dict:
  """Gives functions and their arguments, by name."""
  batch = data.batch(size, PADDING)
  objective = gpo.grpo()
  ours = (grouped(batch.log_probs), objective, prepare(objective, batch))
  mask = batch.mask.astype("float32")
  arrays = (batch.log_probs, batch.old, batch.ref, batch.advantages[:, None], mask)
  plain = tuple(map(jnp.asarray, arrays))
  return {
    "textbook, plain autodiff": (jax.value_and_grad(textbook), plain),
    "gpo_jax": (jax.value_and_grad(loss), ours),
    "gpo_jax with metrics": (jax.value_and_grad(loss_and_metrics, has_aux=True), ours),
    "floor: read 4 arrays, write 1": (floor, plain),
  }
