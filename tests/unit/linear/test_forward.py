"""One pass over the vocabulary: log-probabilities and entropies, to rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax.linear.backward import Slopes
from gpo_jax.linear.chunks import _over_chunks
from gpo_jax.linear.forward import look
from gpo_jax.linear.head import as_head, own_products, scale_logits
from gpo_jax.linear.mesh import Layout
from tests.support.quick import jit

RNG = np.random.default_rng(0)


def looked(logits, tokens, tile_size, counts=True, **settings):
  """What is seen of given logits, those of one-hot hidden states, and whether a pass was enough."""
  rows, tokens = jnp.asarray(logits), jnp.asarray(tokens)
  hidden, head = as_head(rows, gpo.Head(jnp.eye(rows.shape[1], dtype=rows.dtype), **settings))
  target = scale_logits(own_products(hidden, head, tokens), None, head)
  counts = jnp.full(len(rows), counts)
  seen, _ = look(lambda: hidden, head, tokens, target, counts, Layout(), tile_size, True, None)
  return seen.outputs(), bool((seen.reference == target).all())


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
  found, _ = looked(logits, tokens, tile_size)
  np.testing.assert_allclose(found.log_probs, log_probs, atol=2e-6)
  np.testing.assert_allclose(found.entropy, entropy, rtol=1e-5)
  assert (found.log_probs <= 0).all()


@pytest.mark.usefixtures("x64")
def test_float64_stays_float64():
  logits, tokens = np.random.default_rng(0).normal(size=(20, 32)) * 5, np.arange(20)
  found, _ = looked(logits, tokens, 10)
  for x, y in zip(found, formula(logits, tokens)):
    np.testing.assert_allclose(x, y, rtol=1e-12)


@pytest.mark.parametrize("scale", [30.0, 1e4, 1e30])
def test_probabilities_of_0_and_1(scale):
  found, _ = looked(np.float32([[scale, 0, 0], [0, scale, 0]]), [0, 0], 2)
  np.testing.assert_allclose(found.log_probs, [0, -scale], atol=1e-6)
  # Relative to a token of log π = −30, whose digits end at 2⁻²⁰.
  np.testing.assert_allclose(found.entropy, [0, 0], atol=2**-19)


@pytest.mark.parametrize("tile_size", [1, 2, 3])
def test_a_banned_token_is_minus_infinity_and_one_outside_the_vocabulary_nan(tile_size):
  tokens, bias = jnp.array([2, 0, 3, -1]), jnp.array([0.0, 0.0, -jnp.inf])
  head, how = gpo.Head(jnp.zeros((3, 2)), bias), {"tiling": gpo.Tiling(tile_size=tile_size)}
  found = gpo.linear_token_log_probs(jnp.zeros((4, 2)), head, tokens, **how)
  np.testing.assert_array_equal(found.log_probs, [-np.inf, np.float32(-np.log(2)), np.nan, np.nan])
  np.testing.assert_allclose(found.entropy, np.log(2), rtol=1e-6)


# --- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("tile_size", [3, 8])
@pytest.mark.parametrize(("gap", "enough"), [(5, True), (40, True), (60, False), (200, False)])
def test_a_second_pass_measures_improbable_tokens_from_the_largest_logit(gap, enough, tile_size):
  logits = RNG.normal(size=(4, 8)).astype(np.float32)
  logits[:, 2] += gap
  tokens = np.array([2, 2, 0, 2])
  found, one_pass = looked(logits, tokens, tile_size)
  assert one_pass == enough
  for x, y in zip(found, formula(logits, tokens)):
    np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-5)
  with np.errstate(over="ignore"):
    naive = -np.log(np.sum(np.exp(logits[2] - logits[2, 0])))
  assert np.isinf(naive) == (gap > 100)  # what the second pass is for


def test_a_token_that_does_not_count_needs_none():
  logits = np.float32([[0, 500, 0]])
  assert not looked(logits, [0], 3)[1]
  found, _ = looked(logits, [0], 3, counts=False)
  np.testing.assert_array_equal(found.log_probs, 0)


def test_log_probs_near_0_keep_their_digits():
  logits = np.float32([[40, 0, 1]])
  found, _ = looked(logits, [0], 3)
  exact = -(np.exp(-40.0) + np.exp(-39.0))
  np.testing.assert_allclose(found.log_probs[0], exact, rtol=1e-6)
  assert 40 - np.log(np.float32(np.exp(40.0)) + 1 + np.float32(np.e)) > -1e-6  # the usual way: 0


@pytest.mark.quick("improbable-cpu-float32", "probable-chip-bfloat16")
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("chip", [False, True], ids=["cpu", "chip"])
@pytest.mark.parametrize("scale", [1.0, 40.0], ids=["probable", "improbable"])
def test_gradients_of_probable_and_improbable_tokens_on_every_path(chip, scale, dtype):
  """Chunks of 8 of 21 tokens: the first, whole ones, and the last small ones."""
  width, vocabulary, length = 16, 50, 21
  hidden = jnp.asarray(RNG.normal(size=(length, width)), dtype)
  unembedding = jnp.asarray(scale * RNG.normal(size=(vocabulary, width)), dtype)
  tokens = jnp.asarray(RNG.integers(0, vocabulary, length))
  mask = jnp.arange(length) != 4
  given = tuple(jnp.asarray(RNG.normal(size=length), jnp.float32) for _ in range(2))
  head = gpo.Head(unembedding, None, None, jnp.float32(1))
  run = jit(functools.partial(_over_chunks, gpo.Tiling(8), Layout(), lambda _, x: Slopes(*x), chip))
  outputs, _, gradients = run(hidden, head, tokens, jnp.ones(length, bool), mask, given)

  def wanted(hidden, unembedding):
    logits = hidden @ unembedding.T
    log_probs, entropy = gpo.token_log_probs(logits, tokens), gpo.token_entropy(logits)
    weights = [x.astype(jnp.float64) for x in given]
    total = jnp.sum(jnp.where(mask, log_probs * weights[0] + entropy * weights[1], 0))
    return total, log_probs

  wide = [x.astype(jnp.float64) for x in (hidden, unembedding)]
  expected, log_probs = jit(jax.grad(wanted, (0, 1), has_aux=True))(*wide)
  assert (np.min(log_probs) < -100) == (scale > 1)
  wanted_log_probs = np.where(mask, log_probs, 0)
  np.testing.assert_allclose(outputs.log_probs, wanted_log_probs, rtol=1e-6, atol=1e-5)
  eps = 2e-4 if dtype == jnp.float32 else 2 * float(jnp.finfo(dtype).eps)
  for x, y in zip(gradients[:2], expected):
    assert np.linalg.norm(np.asarray(x, np.float64) - y) < eps * np.linalg.norm(y)
