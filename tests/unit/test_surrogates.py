"""Surrogates inside an objective."""

import functools

import jax.numpy as jnp

import gpo_jax as gpo
from gpo_jax import surrogates
from tests.support.batches import batch, value_and_grad

BATCH = batch()


def run(objective, data=BATCH, **changes):
  return value_and_grad(objective, data.log_probs, data.prepare(objective, **changes))


def test_dual_clip_and_dro_in_an_objective():
  for surrogate in (surrogates.dual_clip, functools.partial(surrogates.dro, beta=0.05)):
    value, gradient = run(gpo.grpo().replace(surrogate=surrogate))
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()
