"""Divergences of whole distributions: the formulas, and probabilities of 0."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo

RNG = np.random.default_rng(0)
P, Q = np.log(RNG.dirichlet(np.ones(9), (2, 3, 4)))
WEIGHTS = RNG.normal(size=(3, 4))


vocabulary = gpo.vocabulary
SHARE = 0.3


def relative(p, q):
  """KL(p‖q) of log-probabilities, as in a textbook."""
  return jnp.sum(jnp.exp(p) * (p - q), -1)


def mixed(p, q, beta):
  mixture = jnp.log(beta * jnp.exp(q) + (1 - beta) * jnp.exp(p))
  return beta * relative(q, mixture) + (1 - beta) * relative(p, mixture)


def merged(log_probs, ids):
  """Log-probabilities at ids, and of all others together."""
  rest = np.ones(log_probs.shape, bool)
  np.put_along_axis(rest, np.asarray(ids), False, -1)
  tail = jnp.log(jnp.sum(jnp.where(rest, jnp.exp(log_probs), 0), -1, keepdims=True))
  return jnp.concatenate([jnp.take_along_axis(log_probs, ids, -1), tail], -1)


TOP = jnp.argsort(Q, axis=-1)[..., -4:]
# The function, its formula, and what it would be if it were done wrong.
FORMULAS = {
  "kl": (vocabulary.kl, relative, lambda p, q: relative(q, p)),
  "forward_kl": (vocabulary.forward_kl, lambda p, q: relative(q, p), relative),
  "jensen_shannon": (
    partial(vocabulary.jensen_shannon, beta=SHARE),
    partial(mixed, beta=SHARE),
    partial(mixed, beta=1 - SHARE),
  ),
  "top_k": (
    partial(vocabulary.top_k, k=4),
    lambda p, q: relative(merged(p, TOP), merged(q, TOP)),
    lambda p, q: relative(merged(p, TOP)[..., :-1], merged(q, TOP)[..., :-1]),
  ),
  "top_k_of_another": (
    partial(vocabulary.top_k, k=4, divergence=vocabulary.forward_kl),
    lambda p, q: relative(merged(q, TOP), merged(p, TOP)),
    lambda p, q: relative(q, p),
  ),
}


@pytest.mark.quick("top_k", "kl", "jensen_shannon")
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", FORMULAS)
def test_a_divergence_has_value_and_gradient_of_its_formula(name):
  function, formula, wrong = FORMULAS[name]
  logits = jnp.asarray(P + 1)

  def of(f):
    normal = lambda x: jax.nn.log_softmax(x)
    total = lambda x, y: (jnp.sum(WEIGHTS * f(normal(x), normal(y))), f(normal(x), normal(y)))
    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(logits, jnp.asarray(Q))

  found, expected = of(function), of(formula)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12), found, expected
  )
  assert np.all(found[0][1] > 0)
  assert not np.allclose(found[0][1], of(wrong)[0][1], rtol=0.01)
  assert not np.allclose(found[1][0], of(wrong)[1][0], rtol=0.01)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_small_divergence_keeps_its_digits(name):
  function, formula, _ = FORMULAS[name]
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(3, 3000)) * 3
  both = [logits, logits + rng.normal(size=logits.shape) * 3e-4]
  exact = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in both]
  if "top_k" in name:
    ids = np.argsort(exact[1], -1)[..., -4:]
    with jax.enable_x64(True):
      exact = [np.asarray(merged(jnp.asarray(x), ids)) for x in exact]
    formula = relative if name == "top_k" else FORMULAS["forward_kl"][1]
  with jax.enable_x64(True):
    expected = formula(*map(jnp.asarray, exact))
  single = [jax.nn.log_softmax(jnp.asarray(x, jnp.float32)) for x in both]
  np.testing.assert_allclose(function(*single), expected, rtol=0.02)
  if "top_k" not in name:
    assert not np.allclose(formula(*single), expected, rtol=0.5, atol=0)  # the textbook's


def test_a_truncated_sum_is_no_divergence_and_one_with_a_tail_is():
  p, q = (jnp.log(jnp.asarray(x)) for x in ([0.2, 0.3, 0.5], [0.3, 0.4, 0.3]))
  assert relative(p[:2], q[:2]) < 0
  assert 0 < vocabulary.top_k(p, q, k=2) <= vocabulary.kl(p, q) * (1 + 1e-6)
  np.testing.assert_allclose(vocabulary.top_k(p, q, k=2), vocabulary.kl(p, q), rtol=1e-6)
  assert vocabulary.top_k(p, q, k=1) < vocabulary.kl(p, q)


def test_a_divergence_of_the_teacher_s_list_is_that_of_the_top_k():
  teacher, ids = jax.lax.top_k(jnp.asarray(Q, jnp.float32), 4)
  logits = jnp.asarray(P * 2, jnp.float32)
  policy = gpo.token_log_probs(logits, ids)
  found = vocabulary.kl(*map(vocabulary.with_tail, (policy, teacher)))
  wanted = vocabulary.top_k(jax.nn.log_softmax(logits), jnp.asarray(Q, jnp.float32), k=4)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_list_of_everything_has_a_tail_of_rounding_and_no_infinite_divergence():
  listed = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1]]))
  np.testing.assert_allclose(jnp.exp(vocabulary.with_tail(listed))[:, -1], 0, atol=2e-7)
  all_, most = (
    vocabulary.with_tail(listed[0]),
    vocabulary.with_tail(jnp.log(jnp.array([0.6, 0.2, 0.1]))),
  )
  assert jnp.isfinite(vocabulary.kl(all_, most))
  assert jnp.isfinite(vocabulary.kl(most, all_))
  gradient = jax.grad(lambda x: vocabulary.kl(vocabulary.with_tail(x), most))(listed[0])
  assert jnp.isfinite(gradient).all()


def test_what_are_not_probabilities_have_a_tail_of_nan():
  assert jnp.isnan(vocabulary.with_tail(jnp.log(jnp.array([0.9, 0.2]))))[-1]
  rounded = jnp.log(jnp.array([0.6, 0.41]))  # as of bfloat16
  assert not jnp.isnan(vocabulary.with_tail(rounded)).any()


@pytest.mark.usefixtures("x64")
def test_jensen_shannon_between_its_ends():
  near = lambda beta: vocabulary.jensen_shannon(P, Q, beta=beta)
  np.testing.assert_allclose(near(1e-6) / 1e-6, vocabulary.forward_kl(P, Q), rtol=1e-4)
  np.testing.assert_allclose(near(1 - 1e-6) / 1e-6, vocabulary.kl(P, Q), rtol=1e-4)
  np.testing.assert_allclose(near(0.2), vocabulary.jensen_shannon(Q, P, beta=0.8), rtol=1e-12)
  apart = jnp.log(jnp.array([1.0, 0.0])), jnp.log(jnp.array([0.0, 1.0]))
  np.testing.assert_allclose(vocabulary.jensen_shannon(*apart), np.log(2), rtol=1e-12)


WRONG = {
  "an_end_of_jensen_shannon": (
    lambda: vocabulary.jensen_shannon(P, Q, beta=1.0),
    r"jensen_shannon.beta must be in \(0, 1\); got 1: usually 0.5; forward_kl and kl are its ends",
  ),
  "no_k": (lambda: vocabulary.top_k(P, Q, k=0), "k must be an integer of at least 1; got 0"),
  "more_than_all": (lambda: vocabulary.top_k(P, Q, k=10), "k must be at most V = 9; got 10"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_numbers_are_named(name):
  function, message = WRONG[name]
  with pytest.raises(ValueError, match=message):
    function()


def test_an_excluded_token_adds_nothing_in_the_policy_and_infinity_in_the_reference():
  some, all_ = jnp.log(jnp.array([0.5, 0.5, 0.0])), jnp.log(jnp.array([0.25, 0.25, 0.5]))
  with jax.debug_nans(True):
    value, gradient = jax.value_and_grad(gpo.vocabulary.kl)(some, all_)
  np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
  assert np.isfinite(gradient).all()
  assert gpo.vocabulary.kl(all_, some) == np.inf
  assert gpo.vocabulary.kl(some, some) == 0


@pytest.mark.parametrize("name", ["kl", "forward_kl", "jensen_shannon"])
def test_excluded_tokens_and_nan(name):
  function = FORMULAS[name][0]
  p, q = jnp.log(jnp.array([[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.5, 0.0]]))
  for x, y in ((p, q), (q, p)):
    with np.errstate(all="ignore"):
      direct = np.nansum(np.exp(x) * np.where(x == -np.inf, 0, x - y))
      other = np.nansum(np.exp(y) * np.where(y == -np.inf, 0, y - x))
    expected = {"kl": direct, "forward_kl": other}.get(name)
    if expected is not None:
      np.testing.assert_allclose(function(x, y), expected, rtol=1e-6)
    else:
      assert 0 < function(x, y) < np.log(2)
  # Padding by rows that are banned excludes tokens in both.
  logits = jnp.array([[1.0, 0.0, 2.0, -jnp.inf], [0.5, 1.0, 0.0, -jnp.inf]])
  slope = jax.grad(lambda x, y: gpo.token_divergence(function, x, y))
  padded, plain = (slope(*x) for x in (logits, logits[:, :3]))
  np.testing.assert_allclose(padded, np.append(plain, 0), rtol=1e-6)
  assert np.any(plain)
  for broken in (p.at[0].set(jnp.nan), p.at[2].set(jnp.nan)):
    assert jnp.isnan(function(broken, q))
    assert jnp.isnan(function(q, broken))


@pytest.mark.parametrize("name", FORMULAS)
def test_a_divergence_from_logits_is_that_of_normalised_logits(name):
  logits, ref_logits = (jnp.asarray(x * 3, jnp.float32) for x in (P, Q))
  normalised = (jax.nn.log_softmax(x / 0.7) for x in (logits, ref_logits))
  found = gpo.token_divergence(FORMULAS[name][0], logits, ref_logits, temperature=0.7)
  np.testing.assert_array_equal(found, FORMULAS[name][0](*normalised))
  if name == "kl":
    np.testing.assert_array_equal(found, gpo.exact_kl(logits, ref_logits, temperature=0.7))
