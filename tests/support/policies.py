"""Small policies of real parameters, a plain tree and a module, and a batch that they sampled."""

import jax
import jax.numpy as jnp
import numpy as np

import gpo_jax as gpo
from tests.support.batches import batch, relative_error

WIDTH, VOCABULARY = 8, 16
DATA = batch(prompts=8)
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, VOCABULARY, DATA.mask.shape))


def start(seed=0):
  """Draws parameters."""
  rng = np.random.default_rng(seed)
  shapes = {"embedding": (VOCABULARY, WIDTH), "mix": (WIDTH, WIDTH)}
  shapes["unembedding"] = (VOCABULARY, WIDTH)
  draw = lambda shape: jnp.asarray(2 * rng.normal(size=shape) / WIDTH**0.5, jnp.float32)
  return {name: draw(shape) for name, shape in shapes.items()}


def hidden_states(params, tokens, spec=None):
  """Sums over the tokens before: causal, and every parameter matters."""
  before = jnp.concatenate([jnp.zeros_like(tokens[..., :1]), tokens[..., :-1]], axis=-1)
  rows = params["embedding"].at[before].get(out_sharding=spec)
  return jnp.tanh(jnp.cumsum(rows, axis=-2) @ params["mix"])


def policy(params, tokens):
  """Log-probabilities of tokens by way of the logits."""
  return gpo.token_log_probs(hidden_states(params, tokens) @ params["unembedding"].T, tokens)


def prepare(objective):
  """A rollout of a sampler that is a little stale."""
  old = policy(start(2), TOKENS)
  near = lambda seed: old + np.random.default_rng(seed).normal(0, 0.1, old.shape).astype(np.float32)
  return objective.prepare(
    DATA.rewards, DATA.mask, near(1), ref_log_probs=near(2), sampler_log_probs=near(3)
  )


def assert_trees_close(found, expected, tolerance=1e-5):
  """Compares leaf by leaf, each in terms of its largest value."""
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert relative_error(x, y) < tolerance
