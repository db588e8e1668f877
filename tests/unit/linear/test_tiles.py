"""Gradients a tile of the vocabulary at a time: those of one pass, without its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax.linear.backward import Slopes
from gpo_jax.linear.chunks import as_tiling
from gpo_jax.linear.forward import Seen
from gpo_jax.linear.mesh import Layout
from gpo_jax.linear.tiles import _gradients_of
from tests.support import linear
from tests.support.batches import PRESETS
from tests.support.linear import BIAS, HIDDEN, TILINGS, UNEMBEDDING, assert_same
from tests.support.quick import jit


@pytest.mark.quick("dapo-tiles", "dapo-default")
@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("name", ["dapo", "grpo"])
def test_recomputing_changes_no_result(name, tiling):
  again = (TILINGS[tiling] or gpo.Tiling())._replace(recompute=True)
  found = linear.step(linear.from_hidden, tiling=again)(
    PRESETS[name], HIDDEN, UNEMBEDDING, BIAS, linear.near(name)
  )
  (loss, _), gradients = found
  (wanted_loss, _), wanted = linear.expected(name)
  assert_same((loss, gradients), (wanted_loss, wanted), 2e-5)


def test_recomputing_takes_one_more_product():
  objective, shape = gpo.dapo(), (1, 4, 4)
  rollout = objective.prepare(jnp.eye(1, 4), jnp.ones(shape))

  def loss(hidden, unembedding, recompute):
    tiling = gpo.Tiling(tile_size=16, recompute=recompute)
    return gpo.linear_loss(
      objective, hidden, unembedding, jnp.zeros(shape, int), rollout, tiling=tiling
    )[0]

  for recompute, count in ((False, 3), (True, 4)):
    grad = jax.value_and_grad(functools.partial(loss, recompute=recompute), (0, 1))
    assert linear.products(grad, jnp.ones((*shape, 8)), jnp.ones((64, 8))) == count


def test_recomputing_holds_a_tile_of_logits():
  vocabulary, width, shape = 16384, 64, (1, 4, 16)
  objective = gpo.dapo()
  rollout = objective.prepare(jnp.eye(1, 4), jnp.ones(shape))

  def loss(hidden, unembedding, recompute):
    how = {"tiling": gpo.Tiling(64, 256, recompute)}
    tokens = jnp.zeros(shape, int)
    return gpo.linear_loss(objective, hidden, unembedding, tokens, rollout, **how)[0]

  def held(recompute):
    grad = jax.grad(functools.partial(loss, recompute=recompute), (0, 1))
    return linear.temporaries(grad, (*shape, width), (vocabulary, width))

  chunk = 4 * 64 * vocabulary
  assert held(recompute=False) > chunk
  assert held(recompute=True) < chunk / 4


@pytest.mark.usefixtures("x64")
@pytest.mark.quick("chip-float32")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("chip", [False, True], ids=["cpu", "chip"])
def test_gradients_on_every_path(chip, dtype):
  """Chunks of 8 of 21 tokens, the first apart on a chip; tiles of 16 of 50 entries."""
  rng, width, vocabulary, length = np.random.default_rng(0), 16, 50, 21
  hidden = jnp.asarray(rng.normal(size=(length, width)), dtype)
  unembedding = jnp.asarray(rng.normal(size=(vocabulary, width)), dtype)
  tokens = jnp.asarray(rng.integers(0, vocabulary, length))
  mask = jnp.arange(length) != 4
  slopes = [jnp.asarray(rng.normal(size=length), jnp.float32) for _ in range(2)]
  wide = [x.astype(jnp.float64) for x in (hidden, unembedding)]
  logits = wide[0] @ wide[1].T
  own = jnp.arange(vocabulary)[None] == tokens[:, None]
  reference = jnp.max(logits, axis=-1)
  relative = logits - reference[:, None]
  powers = jnp.where(own, 0, jnp.exp(relative))
  sums = (jnp.sum(jnp.where(own, relative, 0), -1), powers.sum(-1), (powers * relative).sum(-1))
  seen = jax.tree.map(lambda x: x.astype(jnp.float32), Seen(reference, *sums))

  def wanted(hidden, unembedding):
    logits = hidden @ unembedding.T
    log_probs, entropy = gpo.token_log_probs(logits, tokens), gpo.token_entropy(logits)
    weights = [x.astype(jnp.float64) for x in slopes]
    return jnp.sum(jnp.where(mask, log_probs * weights[0] + entropy * weights[1], 0))

  # What is masked may hold anything.
  hidden = jnp.where(mask[:, None], hidden, jnp.nan)
  slopes[0] = jnp.where(mask, slopes[0], jnp.nan)
  head = gpo.Head(unembedding, None, None, jnp.float32(1))
  run = jit(functools.partial(_gradients_of, gpo.Tiling(8, 16), Layout(), chip))
  found = run(hidden, head, tokens, mask, seen, Slopes(*slopes))
  assert found.unembedding.dtype == dtype  # written once
  slopes[0] = jnp.where(mask, slopes[0], 0)
  eps = 1e-5 if dtype == jnp.float32 else 2 * float(jnp.finfo(dtype).eps)
  for x, y in zip(found[:2], jit(jax.grad(wanted, (0, 1)))(*wide)):
    assert np.linalg.norm(np.asarray(x, np.float64) - y) < eps * np.linalg.norm(y)


def test_a_vmap_around_adds_nothing_to_gradients():
  """JAX's own `empty` is batched, and what is batched is summed."""
  hidden, unembedding, tokens = jnp.eye(3), jnp.arange(9.0).reshape(3, 3) / 9, jnp.arange(3)
  f = lambda w: jnp.sum(gpo.linear_token_log_probs(hidden, w, tokens).log_probs)
  scaled = lambda w: jnp.sum(jax.vmap(lambda c: c * f(w))(jnp.array([1.0, -0.5, 2.0])))
  gradient, expected = jit(jax.grad(scaled))(unembedding), jit(jax.grad(f))(unembedding)
  np.testing.assert_allclose(gradient, 2.5 * expected, rtol=1e-5)


@pytest.mark.parametrize("recompute", [1, None, "yes"])
def test_recompute_is_true_or_false(recompute):
  with pytest.raises(ValueError, match=f"recompute must be True or False; got {recompute!r}"):
    as_tiling(gpo.Tiling(recompute=recompute))
