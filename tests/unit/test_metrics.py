"""`summarize` by hand, of slices, of NaN and of nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax import weightings
from tests.support.batches import COVERING, PRESETS, batch, grpo_with
from tests.support.packing import pack
from tests.support.quick import fused

BATCH = batch()
EVERY = pytest.mark.parametrize("name", COVERING)


def effective_sample_size(x):
  return x.sum() ** 2 / x.size / np.sum(x**2)


def of_weights(name, x):
  values = x.mean(), x.std(), x.max(), effective_sample_size(x)
  return dict(zip([f"{name}_{k}" for k in ("mean", "std", "max", "effective_sample_size")], values))


def of_sampler(name, x):
  values = x.mean(), effective_sample_size(x), np.mean(x**2) - 1
  return dict(
    zip([f"{name}_{k}" for k in ("weight_mean", "effective_sample_size", "chi2")], values)
  )


def test_metrics_by_hand():
  objective = gpo.deepseek_v32(beta=0.2)
  rollout = BATCH.prepare(objective)
  loss, terms = objective(BATCH.log_probs, rollout)
  metrics = gpo.summarize(terms, rollout, BATCH.rewards)
  m = BATCH.mask
  d = (BATCH.log_probs - BATCH.old_log_probs)[m].astype(np.float64)
  rho = np.exp(d)
  a = np.broadcast_to(np.asarray(rollout.advantages), m.shape)[m]
  high, low = (rho > 1.2) & (a > 0), (rho < 0.8) & (a < 0)
  logs = {"old": BATCH.old_log_probs[m], "sampler": BATCH.sampler_log_probs[m]}
  weight = logs["old"] - logs["sampler"].astype(np.float64)
  present, divergence = m.any(-1), np.asarray(terms.divergence)
  rewards = BATCH.rewards[present].astype(np.float64)
  product = np.sum(BATCH.old_log_probs - BATCH.sampler_log_probs, -1, where=m)[present]
  factor = np.asarray(terms.factor, np.float64)
  of_response = np.sum(factor, -1, where=m)[present] / m.sum(-1)[present]
  assert factor[m].max() == 1  # no cap holds it
  expected = {
    "tokens": m.sum(),
    "responses": present.sum(),
    "groups": 4,
    "response_length": m.sum() / present.sum(),
    "dead_groups": 1 / 4,
    "reward_mean": rewards.mean(),
    "reward_std": rewards.std(),
    "divergence_mean": divergence[m].mean(),
    "truncated_fraction": 0,
    "response_truncated_fraction": 0,
    **of_weights("factor", factor[m]),
    **of_weights("response_factor", of_response),
    **of_sampler("sampler", np.exp(weight)),
    **of_sampler("response_sampler", np.exp(product.astype(np.float64))),
    "sampler_difference_max": np.max(np.abs(weight)),
    "sampler_correlation": np.corrcoef(logs["old"], logs["sampler"])[0, 1],
    **{f"{k}_log_prob_mean": x.mean() for k, x in logs.items()},
    **{f"{k}_log_prob_std": x.std() for k, x in logs.items()},
    "loss": loss,
    "clip_fraction": np.mean(high | low),
    "clip_fraction_low": np.mean(low),
    "clip_fraction_high": np.mean(high),
    "ratio_mean": rho.mean(),
    "ratio_max": rho.max(),
    "ratio_min": rho.min(),
    "old_kl": np.mean(rho - 1 - d),
    "effective_sample_size": effective_sample_size(rho),
    "bounded_fraction": 0.0,
    "zero_advantage_fraction": np.mean(a == 0),
    "dropped_fraction": np.mean(factor[m] == 0),
    "sampler_kl": np.mean(np.exp(weight) - 1 - weight),
    "surrogate": np.sum(np.asarray(rollout.weights * terms.surrogate)[m]),
    "divergence": np.sum((rollout.weights * divergence)[m]),
  }
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
  assert high.any()
  assert low.any()


@pytest.mark.quick("deepseek_v32", "gspo")
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


@functools.cache
def capped():
  """Metrics of an objective whose importance weights a cap holds, whole and in two slices."""
  cap = functools.partial(gpo.corrections.truncate_importance, cap=1.1)
  objective = PRESETS["grpo"].replace(corrections=(cap,))
  rollout = BATCH.prepare(objective)
  summarize = jax.jit(lambda *args: gpo.summarize(objective(*args[:2])[1], *args[1:]))
  inputs = BATCH.log_probs, rollout, jnp.asarray(BATCH.rewards)
  parts = [
    summarize(*jax.tree.map(lambda x, c=c: x[c], inputs)) for c in (slice(0, 1), slice(1, 4))
  ]
  return summarize(*inputs), parts


def test_metrics_of_slices_merge():
  whole, parts = capped()
  merged = gpo.merge_metrics(parts)
  stacked = gpo.merge_metrics({k: jnp.stack([part[k] for part in parts]) for k in whole})
  assert merged.keys() == whole.keys()
  wrong = {name for name, x in whole.items() if not np.allclose(merged[name], x, rtol=1e-5)}
  assert not wrong
  for name, value in merged.items():
    np.testing.assert_array_equal(value, stacked[name])
  averaged = {k: sum(part[k] for part in parts) / 2 for k in whole}  # what a trainer would log
  off = [k for k in whole if abs(averaged[k] - whole[k]) > 1e-3 * abs(whole[k]) + 1e-6]
  assert len(off) > len(whole) / 2


def test_the_share_that_a_cap_holds():
  whole, _ = capped()
  m, log_weight = BATCH.mask, BATCH.old_log_probs - BATCH.sampler_log_probs
  held = m & (log_weight > np.log(1.1))
  np.testing.assert_allclose(whole["factor_max"], 1.1, rtol=1e-6)
  np.testing.assert_allclose(whole["truncated_fraction"], held.sum() / m.sum(), rtol=1e-6)
  some = held.any(-1).sum() / m.any(-1).sum()
  np.testing.assert_allclose(whole["response_truncated_fraction"], some, rtol=1e-6)


def test_a_slice_without_a_token_changes_nothing_when_merged():
  whole, _ = capped()
  objective = PRESETS["grpo"]
  rollout = BATCH.prepare(objective, mask=np.zeros_like(BATCH.mask))
  empty = gpo.summarize(objective(BATCH.log_probs, rollout)[1], rollout)
  full = {k: whole[k] for k in empty}
  for name, value in gpo.merge_metrics([full, empty]).items():
    np.testing.assert_allclose(value, full[name], rtol=1e-6, err_msg=name)
  assert {float(x) for x in gpo.merge_metrics([empty, empty]).values()} == {0.0}


def test_a_nan_in_one_slice_is_not_lost_when_merged():
  whole, parts = capped()
  bad = {name: value * jnp.nan for name, value in parts[0].items()} | {
    k: parts[0][k] for k in ("tokens", "responses", "groups")
  }
  merged = gpo.merge_metrics([bad, parts[1]])
  assert {k for k, x in merged.items() if jnp.isnan(x)} == whole.keys() - {
    "tokens",
    "responses",
    "groups",
    "truncated_fraction",
    "response_truncated_fraction",
  }


def test_metrics_of_packed_rows_are_those_of_their_responses():
  data = batch(seed=3)
  packed, _ = pack(data, rows=6)
  objective = gpo.gspo()
  rollout = data.prepare(objective)
  wanted = gpo.summarize(objective(data.log_probs, rollout)[1], rollout, data.rewards)
  x, rewards = packed.pop("log_probs"), packed["rewards"]
  old = packed.pop("old_log_probs")
  rollout = objective.prepare(packed.pop("rewards"), packed.pop("mask"), old, **packed)
  found = gpo.summarize(objective(x, rollout)[1], rollout, rewards)
  for name in wanted.keys() - {"groups", "dead_groups"}:  # which are rows here
    np.testing.assert_allclose(found[name], wanted[name], rtol=2e-5, atol=1e-6, err_msg=name)


def test_what_cannot_be_merged():
  whole, parts = capped()
  stacked = {k: jnp.stack([part[k] for part in parts]) for k in whole}
  for given, message in (
    ([], "got an empty sequence"),
    (None, "got None"),
    ([1, 2], r"got \[1, 2\]"),
    ([whole, {**whole, "mine": 0.0}], r"of the same names; got \['mine'\]"),
    ([{"loss": jnp.zeros(())}], "got no groups, responses, tokens"),
    (whole, r"stacked along one axis; got shapes \[\(\)\]"),
    ({**stacked, "loss": stacked["loss"][:, None]}, r"got shapes \[\(2, 1\)\]"),
  ):
    with pytest.raises(ValueError, match=f"metrics must be what summarize returned.*{message}"):
      gpo.merge_metrics(given)


def test_rewards_must_fit():
  objective = gpo.grpo()
  rollout = BATCH.prepare(objective)
  _, terms = objective(BATCH.log_probs, rollout)
  with pytest.raises(ValueError, match=r"rewards must have the shape of responses.*one reward per"):
    gpo.summarize(terms, rollout, BATCH.rewards.ravel())


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
    both = fused(lambda x: keep(*gpo.grpo()(x, rollout)))
    return both.lower(BATCH.log_probs).compile().cost_analysis()["flops"]

  alone = compiled(lambda loss, terms: loss)
  assert compiled(lambda loss, terms: (loss, gpo.summarize(terms, rollout))) > 1.2 * alone
  plain = fused(lambda x: grpo_with(weightings.sequence_mean)(x, rollout)[0])
  assert plain.lower(BATCH.log_probs).compile().cost_analysis()["flops"] == alone
