"""Divergences of whole distributions: the formulas, and probabilities of 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo

RNG = np.random.default_rng(0)
P, Q = np.log(RNG.dirichlet(np.ones(9), (2, 3, 4)))


@pytest.mark.usefixtures("x64")
def test_kl_is_the_formula():
  expected = np.sum(np.exp(P) * (P - Q), -1)
  np.testing.assert_allclose(gpo.vocabulary.kl(P, Q), expected, rtol=1e-12)
  assert np.all(expected > 0)
  assert not np.allclose(expected, np.sum(np.exp(Q) * (Q - P), -1), rtol=0.01)  # the other way


@pytest.mark.usefixtures("x64")
def test_kl_has_the_derivative_of_the_formula():
  def total(logits):
    return jnp.sum(gpo.vocabulary.kl(jax.nn.log_softmax(logits), Q))

  kl = np.sum(np.exp(P) * (P - Q), -1, keepdims=True)
  np.testing.assert_allclose(jax.grad(total)(jnp.asarray(P)), np.exp(P) * (P - Q - kl), rtol=1e-11)


def test_an_excluded_token_adds_nothing_in_the_policy_and_infinity_in_the_reference():
  some, all_ = jnp.log(jnp.array([0.5, 0.5, 0.0])), jnp.log(jnp.array([0.25, 0.25, 0.5]))
  with jax.debug_nans(True):
    value, gradient = jax.value_and_grad(gpo.vocabulary.kl)(some, all_)
  np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
  assert np.isfinite(gradient).all()
  assert gpo.vocabulary.kl(all_, some) == np.inf
  assert gpo.vocabulary.kl(some, some) == 0


def test_exact_kl_is_kl_of_normalised_logits():
  logits, ref_logits = (jnp.asarray(x * 3, jnp.float32) for x in (P, Q))
  normalised = (jax.nn.log_softmax(x) for x in (logits, ref_logits))
  found = gpo.exact_kl(logits, ref_logits)
  np.testing.assert_array_equal(found, gpo.vocabulary.kl(*normalised))
