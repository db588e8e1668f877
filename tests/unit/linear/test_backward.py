"""Gradients in narrow dtypes keep their digits, whatever the loss is scaled by."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax.linear.chunks import _over_chunks
from gpo_jax.linear.mesh import Layout
from gpo_jax.linear.two_passes import Slopes
from tests.support import linear

NARROW = {"float16": jnp.float16, "bfloat16": jnp.bfloat16}
SHAPE, VOCABULARY, WIDTH = (8, 4, 4), 1000, 64
OBJECTIVES = {"one_pass": gpo.dapo(), "two_passes": gpo.gspo()}


@functools.cache
def data(dtype):
  hidden, unembedding, bias, tokens = linear.draw(1, SHAPE, VOCABULARY, WIDTH, dtype=NARROW[dtype])
  return hidden, unembedding * NARROW[dtype](0.25), bias, tokens


def exact(state, slopes):
  """Gradients in float64 of Σ_t slope_t log π_t + entropy slope_t H_t."""
  hidden, unembedding, bias = (np.asarray(x, np.float64) for x in state[:3])
  rows, tokens = hidden.reshape(-1, hidden.shape[-1]), np.ravel(state[3])
  z = rows @ unembedding.T + bias
  log_p = z - z.max(-1, keepdims=True)
  log_p = log_p - np.log(np.sum(np.exp(log_p), -1, keepdims=True))
  p = np.exp(log_p)
  of_log_probs, of_entropy = (np.asarray(x, np.float64).reshape(-1, 1) for x in slopes)
  entropy = -np.sum(p * log_p, -1, keepdims=True)
  slope = of_log_probs * (np.eye(len(bias))[tokens] - p) - of_entropy * p * (log_p + entropy)
  return (slope @ unembedding).reshape(hidden.shape), slope.T @ rows, slope.sum(0)


def norms(found, wanted):
  """Each gradient's relative error, by norm, in units of its dtype's rounding."""
  for x, y in zip(found, wanted, strict=True):
    error = np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y)
    yield error / float(jnp.finfo(x.dtype).eps)


def from_hidden(objective, rollout, state, scale):
  def loss(hidden, unembedding, bias):
    head = gpo.Head(unembedding, bias)
    how = {"tiling": gpo.Tiling(128, 250)}
    return scale * gpo.linear_loss(objective, hidden, head, state[3], rollout, **how)[0]

  return jax.grad(loss, (0, 1, 2))(*state[:3])


@functools.cache
def compiled(dtype, kind):
  """Gradients as a function of the powers of two of the weights and of the loss's scale."""
  state, objective = data(dtype), OBJECTIVES[kind]
  of_state = lambda *x: gpo.token_log_probs(linear.logits_of(*map(jnp.float32, x)), state[3])
  log_probs = linear.jit(of_state)(*state[:3])
  rng = np.random.default_rng(2)
  old = log_probs + rng.normal(size=SHAPE).astype(np.float32) * 0.1
  rollout = objective.prepare(rng.random(SHAPE[:-1]), np.ones(SHAPE), old)
  slopes = linear.jit(jax.grad(lambda x: objective(x, rollout)[0]))(log_probs)
  wanted = exact(state, (slopes, np.zeros(SHAPE)))

  def gradients(weight, scale):
    weighted = rollout.replace(weights=weight * rollout.weights)
    return from_hidden(objective, weighted, state, scale)

  return linear.jit(gradients), wanted


# Powers of two of the weights and of the loss's scale: what comes out is 2^(sum) times as large.
SCALES = [(0, 0), (-24, 24), (24, -24), (-12, 12), (-24, 30), (20, -14)]
WIDE = [(-24, 0), (0, -24), (24, 0), (0, 24), (24, 24), (-24, -24)]  # beyond float16's range


@pytest.mark.quick("float16-one_pass", "bfloat16-two_passes")
@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("dtype", NARROW)
def test_gradients_keep_their_digits_whatever_the_loss_is_scaled_by(dtype, kind):
  gradients, wanted = compiled(dtype, kind)
  for weight, scale in SCALES + (WIDE if dtype == "bfloat16" else []):
    found = gradients(jnp.float32(2.0**weight), jnp.float32(2.0**scale))
    for error in norms(found, (x * 2.0 ** (weight + scale) for x in wanted)):
      assert error < 2, (weight, scale)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_cast_before_the_scale_would_lose_them(kind):
  gradients, wanted = compiled("float16", kind)
  small = gradients(jnp.float32(2.0**-24), jnp.float32(1))
  scaled = [x.astype(jnp.float32) * 2.0**24 for x in small]
  for x, y in zip(scaled, wanted, strict=True):
    assert np.linalg.norm(x - y) / np.linalg.norm(y) > 100 * jnp.finfo(jnp.float16).eps


@pytest.mark.quick("float16")
@pytest.mark.parametrize("dtype", NARROW)
def test_so_do_those_of_log_probs_and_entropies(dtype):
  state = data(dtype)
  rng = np.random.default_rng(3)
  slopes = rng.normal(size=(2, *SHAPE)).astype(np.float32) / 16
  wanted = exact(state, slopes)

  @linear.jit
  def gradients(inner, outer):
    def loss(hidden, unembedding, bias):
      x = gpo.linear_token_log_probs(hidden, gpo.Head(unembedding, bias), state[3])
      terms = inner * (slopes[0] * x.log_probs + slopes[1] * x.entropy)
      return outer * jnp.sum(terms)

    return jax.grad(loss, (0, 1, 2))(*state[:3])

  for inner, outer in [(0, 0), (-24, 24), (24, -24), *((WIDE) if dtype == "bfloat16" else [])]:
    found = gradients(jnp.float32(2.0**inner), jnp.float32(2.0**outer))
    for error in norms(found, (x * 2.0 ** (inner + outer) for x in wanted)):
      assert error < 2, (inner, outer)


@pytest.mark.parametrize("chip", [False, True], ids=["cpu", "chip"])
@pytest.mark.parametrize("dtype", NARROW)
def test_tokens_of_very_different_slopes_keep_theirs(dtype, chip):
  """Those of hidden states to rounding each, with the narrow products of a chip too."""
  hidden, unembedding, bias, tokens = data(dtype)
  slopes = np.random.default_rng(4).normal(size=(2, *SHAPE)).astype(np.float32)
  slopes *= np.float32(2.0) ** np.linspace(-24, 12, slopes[0].size).reshape(SHAPE).astype(int)
  wanted = exact((hidden, unembedding, bias, tokens), slopes)
  head = gpo.Head(unembedding, bias, None, jnp.float32(1))

  @linear.jit
  def gradients(slopes):
    given = lambda _, slopes: Slopes(*slopes)
    arguments = (hidden.reshape(-1, WIDTH), head, tokens.ravel(), jnp.ones(tokens.size, bool))
    flat = tuple(x.ravel() for x in slopes)
    tiling = gpo.Tiling(128, VOCABULARY)
    known = arguments[3]
    return _over_chunks(tiling, Layout(), given, chip, *arguments[:3], known, known, flat)[2]

  found = gradients(tuple(jnp.asarray(slopes)))
  eps = float(jnp.finfo(NARROW[dtype]).eps)
  rows = (np.asarray(x, np.float64).reshape(-1, WIDTH) for x in (found.hidden, wanted[0]))
  for x, y in zip(*rows):
    assert np.linalg.norm(x - y) < eps * np.linalg.norm(y)
  for x, y in zip(found[1:], wanted[1:]):
    assert np.linalg.norm(np.asarray(x, np.float64) - y) < eps * np.linalg.norm(y)


@pytest.mark.quick("float16")
@pytest.mark.parametrize("dtype", NARROW)
def test_so_do_those_of_a_divergence(dtype):
  hidden, unembedding, bias, _ = data(dtype)

  @linear.jit
  def gradients(state, inner, outer):
    def loss(hidden, unembedding, bias):
      reference = jax.lax.stop_gradient((hidden[..., ::-1], unembedding))
      head = gpo.Head(unembedding, bias)
      return outer * jnp.sum(
        inner * gpo.linear_divergence(gpo.vocabulary.kl, hidden, head, *reference)
      )

    return jax.grad(loss, (0, 1, 2))(*state)

  state, one = (hidden[:2], unembedding, bias), jnp.float32(1)
  wanted = [np.asarray(x) for x in gradients(tuple(map(jnp.float32, state)), one, one)]
  for power in (0, -24, 24):
    found = gradients(state, jnp.float32(2.0**power), jnp.float32(2.0**-power))
    assert max(norms(found, wanted)) < 2, power


SCALED = {  # power of two of the weights, loss scale, gradient of the second logit's weight
  "small_weights": (-24, 2.0**15, 3.452e-4),
  "small_weights_twice_the_scale": (-24, 2.0**16, 6.904e-4),
  "larger_weights": (-20, 2.0**15, 5.5235e-3),
  "a_scale_beyond_float16": (0, 2.0**16, 11583.6),
}


@pytest.mark.parametrize("kind", ["loss", "log_probs"])
@pytest.mark.parametrize("name", SCALED)
def test_a_scaled_loss_in_float16(name, kind):
  power, scale, wanted = SCALED[name]
  objective = gpo.dapo()
  rollout = objective.prepare([[1.0, 0.0]], jnp.ones((1, 2, 1)))
  rollout = rollout.replace(weights=rollout.weights * 2.0**power)
  hidden = jnp.array([[[[1, 0]], [[0, 1]]]], jnp.float16)
  tokens = jnp.array([[[0], [1]]])

  def loss(unembedding):
    if kind == "loss":
      return scale * gpo.linear_loss(objective, hidden, unembedding, tokens, rollout)[0]
    log_probs = gpo.linear_token_log_probs(hidden, unembedding, tokens).log_probs
    return scale * objective(log_probs, rollout)[0]

  gradient = jax.grad(loss)(jnp.zeros((2, 2), jnp.float16))
  np.testing.assert_allclose(gradient[1, 0], wanted, rtol=1e-3)
