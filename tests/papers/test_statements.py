"""What papers state of their formulas, beyond the formulas themselves."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax import advantages, corrections, divergences, levels, weightings
from tests.support.batches import batch, relative_error, value_and_grad
from tests.support.quick import jit


def response(advantage, *values):
  """One response's log-probabilities, and its rollout of a policy of log-probabilities 0."""
  x = jnp.array(values)
  ones = jnp.ones_like(x)
  return x, gpo.Rollout(
    advantages=jnp.array([advantage]), mask=ones, weights=ones, old_log_probs=jnp.zeros_like(x)
  )


def test_max_rl_climbs_the_logarithm_of_the_chance_of_success():
  size, success = 300, 0.3
  slope = 0.0
  for k in range(size + 1):
    chance = math.comb(size, k) * success**k * (1 - success) ** (size - k)
    rewards = np.array([1.0] * k + [0.0] * (size - k), np.float32)
    score = np.where(rewards == 1, 1 / success, -1 / (1 - success))
    slope += chance * np.mean(advantages.max_rl(rewards) * score)
  np.testing.assert_allclose(slope, 1 / success, rtol=1e-5)


def test_pass_at_k_gives_nothing_to_a_shared_first_place():
  np.testing.assert_array_equal(advantages.pass_at_k([2.0, 2.0, 1.0]), 0)


@pytest.mark.parametrize(("advantage", "limited"), [(0.0, 0.3), (-1.0, 0.3), (1.0, -0.3)])
def test_gmpo_clips_the_side_that_an_advantage_rewards_and_0_like_a_negative_one(
  advantage, limited
):
  level = levels.clipped_sequence(*response(advantage, 1.0, -1.0))
  np.testing.assert_allclose(level, limited, rtol=1e-6)


@pytest.mark.parametrize(("advantage", "peak"), [(1.0, 2 / 3), (-1.0, 3 / 2)])
def test_vespo_is_highest_at_k_over_lambda(advantage, peak):
  ratios = [0.97 * peak, peak, 1.03 * peak]
  below, top, above = (corrections.vespo(*response(advantage, math.log(w)))[0] for w in ratios)
  assert top > below
  assert top > above


@pytest.mark.parametrize("ratio", [0.2, 0.5, 2.0, 5.0])
def test_vespo_fades_bad_responses_sooner_below_1_and_good_ones_sooner_above(ratio):
  good, bad = (corrections.vespo(*response(a, math.log(ratio)))[0] for a in (1.0, -1.0))
  assert bad < good if ratio < 1 else good < bad


def test_the_objective_for_trls_rloo_is_ours_on_policy():
  data = batch()
  trl = gpo.r1(beta=None).replace(advantage=advantages.leave_one_out)
  gradients = [
    value_and_grad(o, data.log_probs, data.prepare(o, old_log_probs=data.log_probs))[1]
    for o in (trl, gpo.rloo())
  ]
  assert relative_error(*gradients) < 1e-5


# --- the KL of whole responses, by enumeration ---------------------------------------------------
# All responses of up to two tokens of {0, 1}; 0 ends one. A policy is a table of three states.

RESPONSES = ((0,), (1, 0), (1, 1))
MASK = np.array([[1, 0], [1, 1], [1, 1]], bool)
POLICY, OLD, REF = np.random.default_rng(0).normal(size=(3, 2, 2))


def token_log_probs(logits):
  table = jax.nn.log_softmax(logits)
  rows = [[table[t, y] for t, y in enumerate(r)] + [0.0] * (2 - len(r)) for r in RESPONSES]
  return jnp.stack([jnp.stack([jnp.asarray(x, float) for x in row]) for row in rows])


def true_kl(logits):
  """KL(π‖π_ref) over responses."""
  log_probs, ref = (jnp.sum(token_log_probs(x), axis=-1) for x in (logits, REF))
  return jnp.sum(jnp.exp(log_probs) * (log_probs - ref))


EXACT = {
  "token_mean": (weightings.token_mean, False),
  "sequence_mean": (weightings.sequence_mean, False),
  "token_sum": (weightings.token_sum, True),
  "sequence_sum": (weightings.sequence_sum, True),
  "constant_length": (partial(weightings.constant_length, length=1.0), True),
}


@pytest.mark.quick("sequence_sum", "constant_length")
@pytest.mark.parametrize("name", EXACT)
def test_sequence_unbiased_is_exact_where_weights_do_not_depend_on_lengths(name, x64):
  weighting, exact = EXACT[name]
  mask, old = jnp.asarray(MASK), token_log_probs(OLD)
  weights = jax.vmap(weighting)(mask[:, None])[:, 0]  # each response is a batch of its own
  rollout = gpo.Rollout(
    advantages=jnp.zeros(len(RESPONSES)),
    mask=mask,
    weights=weights * jnp.exp(jnp.sum(old, axis=-1, keepdims=True)),
    old_log_probs=old,
    ref_log_probs=token_log_probs(REF),
  )
  objective = gpo.gpo(beta=1.0).replace(divergence=divergences.sequence_unbiased)
  loss = lambda logits: objective(token_log_probs(logits), rollout)[0]
  found = jit(jax.value_and_grad(loss))(POLICY)
  expected = jit(jax.value_and_grad(true_kl))(POLICY)
  assert [relative_error(*pair) < 1e-12 for pair in zip(found, expected)] == [exact] * 2
