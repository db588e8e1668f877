"""`summarize` by hand, of slices, of NaN and of nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax import weightings
from tests.support.batches import COVERING, PRESETS, batch, grpo_with

BATCH = batch()
EVERY = pytest.mark.parametrize("name", COVERING)


def test_metrics_by_hand():
  objective = gpo.deepseek_v32(beta=0.2)
  rollout = BATCH.prepare(objective)
  loss, terms = objective(BATCH.log_probs, rollout)
  metrics = gpo.summarize(terms, rollout)
  m = BATCH.mask
  d = (BATCH.log_probs - BATCH.old_log_probs)[m].astype(np.float64)
  rho = np.exp(d)
  a = np.broadcast_to(np.asarray(rollout.advantages), m.shape)[m]
  high, low = (rho > 1.2) & (a > 0), (rho < 0.8) & (a < 0)
  weight = (BATCH.old_log_probs - BATCH.sampler_log_probs)[m].astype(np.float64)
  expected = {
    "loss": loss,
    "clip_fraction": np.mean(high | low),
    "clip_fraction_low": np.mean(low),
    "clip_fraction_high": np.mean(high),
    "ratio_mean": rho.mean(),
    "ratio_max": rho.max(),
    "ratio_min": rho.min(),
    "old_kl": np.mean(rho - 1 - d),
    "effective_sample_size": rho.sum() ** 2 / rho.size / np.sum(rho**2),
    "bounded_fraction": 0.0,
    "zero_advantage_fraction": np.mean(a == 0),
    "factor_mean": np.mean(np.asarray(terms.factor)[m]),
    "dropped_fraction": np.mean(np.asarray(terms.factor)[m] == 0),
    "sampler_kl": np.mean(np.exp(weight) - 1 - weight),
    "surrogate": np.sum(np.asarray(rollout.weights * terms.surrogate)[m]),
    "divergence": np.sum(np.asarray(rollout.weights * terms.divergence)[m]),
  }
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
  assert high.any()
  assert low.any()


@EVERY
def test_metrics_of_a_cut_batch(name):
  objective = PRESETS[name]
  rollout = BATCH.prepare(objective)
  _, terms = objective(BATCH.log_probs, rollout)
  expected = gpo.summarize(terms, rollout)
  cuts = [slice(0, 1), slice(1, 4)]
  parts = [
    objective(BATCH.log_probs[c], jax.tree.map(lambda x, c=c: x[c], rollout))[1] for c in cuts
  ]
  joined = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
  metrics = jax.jit(gpo.summarize)(joined, rollout)
  assert metrics.keys() == expected.keys()
  for key, value in expected.items():
    np.testing.assert_allclose(metrics[key], value, rtol=1e-5, atol=1e-7, err_msg=key)


def test_no_metric_of_a_ratio_overlooks_a_nan():
  old = np.zeros((1, 8, 1024), np.float32)
  rollout = gpo.dapo().prepare(np.arange(8.0)[None], np.ones_like(old), old)
  _, terms = gpo.dapo()(jnp.asarray(old).at[0, 3, 17].set(jnp.nan), rollout)
  metrics = jax.jit(gpo.summarize)(terms, rollout)
  names = ("ratio_mean", "ratio_max", "ratio_min", "effective_sample_size", "old_kl", "loss")
  assert all(jnp.isnan(metrics[name]) for name in names)


def test_bad_terms():
  objective = gpo.grpo()
  rollout = BATCH.prepare(objective)
  both = objective(BATCH.log_probs, rollout)
  for given in (both, None, rollout):
    with pytest.raises(ValueError, match=r"terms must be Terms; got .*summarize\(terms, rollout\)"):
      gpo.summarize(given, both[1])
  with pytest.raises(ValueError, match="rollout must be a Rollout.*got NoneType"):
    gpo.summarize(both[1], None)
  half = jax.tree.map(lambda x: x[:2], rollout)
  with pytest.raises(
    ValueError,
    match=r"terms must have the shape of rollout.mask, \[2, 4, 6\]; got \[4, 4, 6\]: concatenate",
  ):
    gpo.summarize(both[1], half)


def test_metrics_of_an_empty_batch_are_0():
  objective = gpo.grpo()
  rollout = BATCH.prepare(objective, mask=np.zeros_like(BATCH.mask))
  metrics = gpo.summarize(objective(BATCH.log_probs, rollout)[1], rollout)
  assert {float(v) for v in metrics.values()} == {0.0}


def test_metrics_cost_nothing_when_unused():
  rollout = BATCH.prepare(gpo.grpo())

  def compiled(keep):
    both = jax.jit(lambda x: keep(*gpo.grpo()(x, rollout)))
    return both.lower(BATCH.log_probs).compile().cost_analysis()["flops"]

  alone = compiled(lambda loss, terms: loss)
  assert compiled(lambda loss, terms: (loss, gpo.summarize(terms, rollout))) > 1.2 * alone
  plain = jax.jit(lambda x: grpo_with(weightings.sequence_mean)(x, rollout)[0])
  assert plain.lower(BATCH.log_probs).compile().cost_analysis()["flops"] == alone
