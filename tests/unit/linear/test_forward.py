"""One pass over the vocabulary: log-probabilities and entropies, to rounding."""

import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax.linear.forward import Seen, look
from gpo_jax.linear.head import as_head

RNG = np.random.default_rng(0)


def looked(logits, tokens, tile_size, known=True, **settings):
  """What is seen of given logits: those of one-hot hidden states."""
  rows = jnp.asarray(logits)
  hidden, head = as_head(rows, gpo.Head(jnp.eye(rows.shape[1], dtype=rows.dtype), **settings))
  known = jnp.full(len(rows), known)
  return look(hidden, head, jnp.asarray(tokens), known, tile_size, True, None)[0].outputs()


def formula(logits, tokens):
  z = np.asarray(logits, np.float64)
  log_p = z - z.max(-1, keepdims=True)
  log_p = log_p - np.log(np.sum(np.exp(log_p), -1, keepdims=True))
  p = np.exp(log_p)
  return log_p[np.arange(len(z)), tokens], -np.sum(np.where(p > 0, p * log_p, 0), -1)


@pytest.mark.parametrize("offset", [0, 300, -300, 10_000])
@pytest.mark.parametrize("tile_size", [10, 32])
def test_log_probs_keep_their_digits_however_large_logits_are(offset, tile_size):
  logits = (RNG.normal(size=(64, 32)) + offset).astype(np.float32)
  tokens = np.arange(64) % 32
  log_probs, entropy = formula(logits, tokens)
  found = looked(logits, tokens, tile_size)
  np.testing.assert_allclose(found.log_probs, log_probs, atol=2e-6)
  np.testing.assert_allclose(found.entropy, entropy, rtol=1e-5)
  assert (found.log_probs <= 0).all()


@pytest.mark.usefixtures("x64")
def test_float64_stays_float64():
  logits, tokens = RNG.normal(size=(20, 32)) * 5, np.arange(20)
  found = looked(logits, tokens, 10)
  for x, y in zip(found, formula(logits, tokens)):
    np.testing.assert_allclose(x, y, rtol=1e-12)


@pytest.mark.parametrize("scale", [30.0, 1e4, 1e30])
def test_probabilities_of_0_and_1(scale):
  found = looked(np.float32([[scale, 0, 0], [0, scale, 0]]), [0, 0], 2)
  np.testing.assert_allclose(found.log_probs, [0, -scale], atol=1e-6)
  np.testing.assert_allclose(found.entropy, [0, 0], atol=1e-6)


@pytest.mark.parametrize("tile_size", [1, 2, 3])
def test_a_banned_token_is_minus_infinity_and_one_outside_the_vocabulary_nan(tile_size):
  tokens, bias = jnp.array([2, 0, 3, -1]), jnp.array([0.0, 0.0, -jnp.inf])
  head, how = gpo.Head(jnp.zeros((3, 2)), bias), {"tiling": gpo.Tiling(tile_size=tile_size)}
  found = gpo.linear_token_log_probs(jnp.zeros((4, 2)), head, tokens, **how)
  np.testing.assert_array_equal(found.log_probs, [-np.inf, np.float32(-np.log(2)), np.nan, np.nan])
  np.testing.assert_allclose(found.entropy, np.log(2), rtol=1e-6)
  assert jnp.isnan(looked(jnp.zeros((1, 3)), [0], tile_size, known=False).log_probs).all()


def test_tiles_may_be_seen_in_any_order():
  logits = jnp.asarray(RNG.normal(size=(12, 5)) * 20, jnp.float32)
  own = jnp.arange(12)[:, None] == jnp.array([0, 3, 6, 9, 11])[None]
  zero = jnp.zeros(5)
  start = Seen(zero - 1e30, zero, zero, zero)
  found = []
  for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
    seen = start
    for tile in order:
      rows = slice(4 * tile, 4 * tile + 4)
      seen = seen.add(logits[rows], own[rows])
    found.append(seen.outputs())
  for other in found[1:]:
    for x, y in zip(other, found[0]):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  for x, y in zip(found[0], formula(logits.T, [0, 3, 6, 9, 11])):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
