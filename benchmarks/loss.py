"""Loss and gradient from log-probabilities, beside plain autodiff of the textbook formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import gpo_jax as gpo
from benchmarks.peers import torch_contestants
from benchmarks.timing import interleave, table

SHAPES = [(8, 8, 1024), (64, 8, 2048)]
PADDING = 0.3


def batch(shape: tuple[int, int, int]) -> dict[str, jax.Array]:
  """Random log-probabilities of a slightly stale sampler, with ragged rows."""
  rng = np.random.default_rng(0)
  lengths = rng.uniform(1 - 2 * PADDING, 1, shape[:-1]) * shape[-1]
  current = rng.normal(-1.5, 0.5, shape)
  return {
    "rewards": jnp.asarray(rng.integers(0, 2, shape[:-1]), jnp.float32),
    "mask": jnp.asarray(np.arange(shape[-1]) < lengths[..., None]),
    "log_probs": jnp.asarray(current, jnp.float32),
    "old": jnp.asarray(current + rng.normal(0, 0.1, shape), jnp.float32),
    "ref": jnp.asarray(current + rng.normal(0, 0.1, shape), jnp.float32),
  }


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


def main() -> str:
  """Times both shapes and returns the tables."""
  tables = []
  for shape in SHAPES:
    data = batch(shape)
    objective = gpo.grpo()
    rollout = objective.prepare(
      data["rewards"], data["mask"], data["old"], ref_log_probs=data["ref"]
    )
    plain = (
      data["log_probs"],
      data["old"],
      data["ref"],
      rollout.advantages,
      data["mask"].astype(jnp.float32),
    )

    def loss(log_probs, objective, rollout):
      return objective(log_probs, rollout)[0]

    def loss_and_metrics(log_probs, objective, rollout):
      value, terms = objective(log_probs, rollout)
      return value, gpo.summarize(terms, rollout)

    ours = jax.jit(jax.value_and_grad(loss))
    with_metrics = jax.jit(jax.value_and_grad(loss_and_metrics, has_aux=True))
    theirs = jax.jit(jax.value_and_grad(textbook))
    arguments = (data["log_probs"], objective, rollout)
    contestants = {
      "textbook, plain autodiff": functools.partial(theirs, *plain),
      "gpo_jax": functools.partial(ours, *arguments),
      "gpo_jax with metrics": functools.partial(with_metrics, *arguments),
      "floor: read 4 arrays, write 1": functools.partial(jax.jit(floor), *plain),
      **torch_contestants(plain),
    }
    rows, length = shape[0] * shape[1], shape[2]
    title = f"GRPO loss and gradient, {rows} rows of {length} tokens, float32, 30 % padding"
    tables.append(table(title, interleave(contestants), "textbook, plain autodiff"))
  return "\n\n".join(tables)
