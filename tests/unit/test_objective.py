"""An objective is a pytree; what it returns, and its errors."""

import functools
import math
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gpo_jax as gpo
from gpo_jax import Rollout, corrections, levels, weightings
from tests.support.batches import COVERING, PRESETS, batch

BATCH = batch()


def test_signs():
  one = jnp.ones((1, 1))
  rollout = Rollout(advantages=one, mask=one, weights=one, ref_log_probs=-one)
  objective = gpo.grpo(beta=2.0)
  loss, terms = objective(jnp.zeros((1, 1)), rollout)
  np.testing.assert_allclose(terms.surrogate, [[1.0]])
  np.testing.assert_allclose(terms.divergence, [[math.exp(-1)]], rtol=1e-6)
  np.testing.assert_allclose(loss, 2 * math.exp(-1) - 1, rtol=1e-6)


def test_a_schedule_compiles_once():
  traced = chex.assert_max_traces(n=1)(lambda objective, x, r: objective(x, r)[0])
  step = jax.jit(traced)
  schedule = optax.schedules.linear_schedule(0.1, 0.0, 5)
  values = []
  for count in range(4):
    objective = gpo.grpo(
      beta=schedule(count), epsilon_low=[0.2, 1, np.float64(0.3), jnp.float32(0.1)][count]
    )
    values.append(step(objective, BATCH.log_probs, BATCH.prepare(objective)))
  assert len({float(v) for v in values}) == 4


def test_vmap_over_objectives_is_a_sweep():
  betas = jnp.array([0.0, 0.1, 1.0])
  rollout = BATCH.prepare(gpo.grpo())
  sweep = jax.vmap(lambda beta: gpo.grpo(beta=beta)(BATCH.log_probs, rollout)[0])(betas)
  expected = [gpo.grpo(beta=float(b))(BATCH.log_probs, rollout)[0] for b in betas]
  # A loss near 0 is a difference: what rounds are the terms.
  np.testing.assert_allclose(sweep, expected, rtol=0, atol=1e-6 * np.max(np.abs(expected)))
  stacked = jax.tree.map(
    lambda *x: jnp.stack(x), gpo.grpo(epsilon_low=0.1), gpo.grpo(epsilon_low=0.3)
  )
  losses = jax.vmap(lambda o: o(BATCH.log_probs, rollout)[0])(stacked)
  expected = [gpo.grpo(epsilon_low=e)(BATCH.log_probs, rollout)[0] for e in (0.1, 0.3)]
  np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_meta_gradients_through_an_objective(x64):
  data = batch(dtype=np.float64)
  rollout = data.prepare(gpo.grpo())

  @jax.jit
  def after_one_step(beta, epsilon):
    objective = gpo.grpo(beta=beta, epsilon_low=epsilon)
    gradient = jax.grad(lambda x: objective(x, rollout)[0])(data.log_probs)
    return gpo.dapo()(data.log_probs - 5.0 * gradient, rollout)[0]

  slope = jax.jit(jax.grad(after_one_step))(0.1, 0.2)
  numeric = (after_one_step(0.1 + 1e-5, 0.2) - after_one_step(0.1 - 1e-5, 0.2)) / 2e-5
  np.testing.assert_allclose(slope, numeric, rtol=1e-6)
  loss = jax.jit(lambda epsilon: gpo.grpo(epsilon_low=epsilon)(data.log_probs, rollout)[0])
  numeric = (loss(0.2 + 1e-6) - loss(0.2 - 1e-6)) / 2e-6
  np.testing.assert_allclose(jax.grad(loss)(0.2), numeric, rtol=1e-6)


def test_meta_gradients_of_weights_and_advantages_are_0():
  base = gpo.dr_grpo(length=8).replace(
    advantage=functools.partial(gpo.advantages.standardize, eps=0.1),
    corrections=(functools.partial(corrections.truncate_importance, cap=0.9),),
  )
  slopes = jax.grad(lambda o: o(BATCH.log_probs, BATCH.prepare(o))[0])(base)
  assert slopes.weighting.keywords["length"] == 0
  assert slopes.advantage.keywords["eps"] == 0
  assert slopes.surrogate.keywords["epsilon_low"] != 0
  assert slopes.corrections[0].keywords["cap"] != 0


def test_leaves_are_numbers_and_structure_is_functions():
  objective = gpo.grpo()
  assert len(jax.tree.leaves(objective)) == 2
  assert jax.tree.structure(objective) == jax.tree.structure(gpo.grpo(epsilon_low=0.5, beta=1))
  assert jax.tree.structure(objective) != jax.tree.structure(gpo.grpo(beta=None))
  assert repr(jax.tree.map(lambda x: x, objective)) == repr(objective)
  assert all(isinstance(leaf, str) for leaf in jax.tree.leaves(jax.tree.map(str, objective)))
  (path, _), *_ = jax.tree_util.tree_leaves_with_path(objective)
  assert "surrogate" in jax.tree_util.keystr(path)
  assert repr(objective) == (
    "Objective(surrogate=clip(epsilon_low=0.2), level=token, advantage=standardize, "
    "weighting=sequence_mean, divergence=k3, beta=0.04)"
  )
  assert "beta" in repr(jax.jit(lambda o: (repr(o), o)[1])(objective))


def test_replace_and_pickle():
  objective = gpo.dapo().replace(level=levels.sequence, weighting=weightings.sequence_mean)
  again = pickle.loads(pickle.dumps(objective))
  rollout = BATCH.prepare(objective)
  assert again(BATCH.log_probs, rollout)[0] == objective(BATCH.log_probs, rollout)[0]
  assert repr(again) == repr(objective)


def test_any_slot_may_be_a_lambda():
  objective = gpo.Objective(
    surrogate=lambda log_ratio, advantages: jnp.tanh(log_ratio) * advantages,
    level=lambda log_ratio, rollout: log_ratio / 2,
    advantage=lambda rewards, where: rewards - 0.5,
    weighting=lambda mask, segment_ids: mask.astype(float) / 10,
    divergence=lambda ref_log_ratio, log_ratio, rollout: ref_log_ratio**2,
    beta=0.1,
    corrections=(lambda log_probs, rollout: jnp.exp(-log_probs),),
  )
  data = type(BATCH)(**{k: v.copy() for k, v in vars(BATCH).items()})
  rollout = data.prepare(objective)
  x, old, ref = data.log_probs, data.old_log_probs, data.ref_log_probs
  surrogate = np.tanh((x - old) / 2) * (data.rewards[..., None] - 0.5) * np.exp(-x)
  expected = np.sum((0.1 * (x - ref) ** 2 - surrogate) / 10, where=data.mask)
  loss, terms = objective(x, rollout)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  gate = (1 - np.tanh((x - old) / 2) ** 2) * (data.rewards[..., None] - 0.5)
  np.testing.assert_allclose(terms.gate[data.mask], gate[data.mask], rtol=1e-4, atol=1e-6)


def test_an_objective_of_abstract_leaves_can_be_printed():
  assert "clip" in str(jax.eval_shape(gpo.grpo))
  assert "clip" in str(jax.tree.map(lambda x: x.dtype, gpo.grpo()))


def test_terms_carry_no_gradient():
  rollout = BATCH.prepare(gpo.grpo())

  def norm(log_probs):
    _, terms = gpo.grpo()(log_probs, rollout)
    return sum(jnp.sum(x) for x in jax.tree.leaves(terms) if x.dtype == log_probs.dtype)

  np.testing.assert_array_equal(jax.grad(norm)(BATCH.log_probs), 0)


SHORT = BATCH.old_log_probs[..., :-1]
BAD_ROLLOUTS = {
  "old": ({"old_log_probs": SHORT}, r"old_log_probs must have the shape of mask.*\[4, 4, 5\]"),
  "ref": ({"ref_log_probs": SHORT}, "ref_log_probs must have"),
  "no_ref": ({"ref_log_probs": None}, "needs rollout.ref_log_probs: pass ref_log_probs="),
  "weights": ({"weights": np.ones((4, 6))}, "weights must have the shape of mask"),
  "advantages": (
    {"advantages": np.ones((4, 3))},
    r"advantages must be .*got advantages \[4, 3\], mask \[4, 4, 6\]",
  ),
  "float_ids": ({"segment_ids": np.ones((4, 4, 6))}, "segment_ids must be integers"),
  "ids": ({"segment_ids": np.ones((4, 4), int)}, r"segment_ids must have .*\[4, 4\]"),
  "factor": ({"factor": np.ones(3)}, r"factor must have .*factor \[3\]"),
  "complex_mask": ({"mask": np.ones((4, 4, 6), complex)}, "mask must hold bools or 0 and 1"),
  "no_mask": ({"mask": None}, "mask must hold bools or 0 and 1; got None"),
  "no_advantages": ({"advantages": None}, "advantages must hold real numbers; got None"),
  "no_weights": ({"weights": None}, "weights must hold real numbers; got None"),
}


@pytest.mark.parametrize("case", BAD_ROLLOUTS)
def test_bad_rollouts(case):
  change, message = BAD_ROLLOUTS[case]
  rollout = BATCH.prepare(gpo.deepseek_v32()).replace(**change)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(gpo.deepseek_v32(), jnp.asarray(BATCH.log_probs), rollout)


def test_bad_calls():
  rollout = BATCH.prepare(gpo.grpo())
  with pytest.raises(ValueError, match=r"log_probs must have the shape of mask.*\[4, 4, 5\]"):
    gpo.grpo()(BATCH.log_probs[..., :-1], rollout)
  with pytest.raises(ValueError, match="log_probs must hold real numbers"):
    gpo.grpo()(BATCH.log_probs.astype(complex), rollout)
  for given in (BATCH.log_probs, None, vars(rollout)):
    with pytest.raises(ValueError, match=r"must be a Rollout.*objective\(log_probs, rollout\)"):
      gpo.grpo()(rollout, given)
  with pytest.raises(ValueError, match="needs rewards or advantages, one of the two; got neither"):
    gpo.grpo().prepare(None, BATCH.mask)
  with pytest.raises(ValueError, match="mask must hold bools or 0 and 1; got None"):
    gpo.grpo().prepare(BATCH.rewards)
  with pytest.raises(ValueError, match="log_probs must hold real numbers; got None"):
    gpo.grpo()(None, rollout)
  with pytest.raises(ValueError, match=r"one value per response, \[4, 4\].*got rewards \[4\]"):
    gpo.grpo().prepare(BATCH.rewards[0], BATCH.mask)
  with pytest.raises(ValueError, match=r"mask must be .*\[4, 0\]"):
    gpo.grpo().prepare(jnp.ones(4), jnp.ones((4, 0)))
  with pytest.raises(ValueError, match="needs rollout.sampler_log_probs"):
    objective = gpo.dapo().replace(corrections=(corrections.truncate_importance,))
    objective(BATCH.log_probs, BATCH.prepare(objective, sampler_log_probs=None))
  with pytest.raises(ValueError, match=r"surrogate must return float32 \[4, 4, 6\]"):
    gpo.dapo().replace(surrogate=lambda d, a: jnp.sum(d))(BATCH.log_probs, rollout)
  with pytest.raises(ValueError, match="divergence must return"):
    gpo.grpo().replace(divergence=lambda r, d, _: 1.0)(BATCH.log_probs, rollout)
  with pytest.raises(ValueError, match="groups of at least 2"):
    gpo.rloo().prepare(jnp.ones((4, 1)), jnp.ones((4, 1, 2)))


@pytest.mark.parametrize("name", COVERING)
def test_losses_are_the_loss_before_it_is_weighted(name):
  objective = PRESETS[name]
  rollout = BATCH.prepare(objective)
  log_probs = jnp.where(BATCH.mask, BATCH.log_probs, jnp.nan)
  losses = objective.losses(log_probs, rollout)
  np.testing.assert_array_equal(losses[~BATCH.mask], 0)
  weighted = lambda x: jnp.sum(rollout.weights * objective.losses(x, rollout))
  value, gradient = jax.value_and_grad(weighted)(log_probs)
  expected, slope = jax.value_and_grad(lambda x: objective(x, rollout)[0])(log_probs)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-9)
  other = rollout.replace(weights=7 * rollout.weights)
  np.testing.assert_array_equal(objective.losses(log_probs, other), losses)


def test_a_divergence_of_ones_own_needs_no_reference():
  kl = jnp.abs(jnp.asarray(BATCH.log_probs))
  objective = gpo.grpo().replace(divergence=lambda *_: kl)
  rollout = BATCH.prepare(objective, ref_log_probs=None)
  _, terms = objective(BATCH.log_probs, rollout)
  np.testing.assert_array_equal(terms.divergence, kl)
  with pytest.raises(ValueError, match="without a reference policy.*pass ref_log_probs="):
    objective.replace(divergence=lambda ref, *_: ref**2)(BATCH.log_probs, rollout)
  with pytest.raises(ValueError, match=r"divergence=k3 needs rollout.ref_log_probs"):
    gpo.grpo()(BATCH.log_probs, rollout)


def test_a_slot_sees_what_it_closes_over_now():
  rollout, seen = BATCH.prepare(gpo.grpo()), []
  kl = jnp.ones(BATCH.mask.shape)
  objective = gpo.grpo(beta=1.0).replace(divergence=lambda *_: kl)
  for factor in (1.0, 2.0):
    kl = jnp.full(BATCH.mask.shape, factor)
    seen.append(
      [objective(BATCH.log_probs, rollout)[0], objective.losses(BATCH.log_probs, rollout)]
    )
  assert seen[1][0] > seen[0][0] + 0.5
  assert jnp.sum(seen[1][1]) > jnp.sum(seen[0][1])


class Scaled:
  """A surrogate with a state."""

  scale = 1.0

  def __call__(self, log_ratio, advantages):
    return self.scale * log_ratio * advantages


def test_an_object_is_called_as_it_is_now():
  surrogate, rollout = Scaled(), BATCH.prepare(gpo.gpg())
  objective, losses = gpo.gpg().replace(surrogate=surrogate), []
  for surrogate.scale in (1.0, 3.0):
    losses.append(objective(BATCH.log_probs, rollout)[0])
  np.testing.assert_allclose(losses[1], 3 * losses[0], rtol=1e-5)


def test_integers_and_bools_stay_what_they_are():
  seen = []

  def surrogate(log_ratio, advantages, *, count, flip):
    seen.append((count, flip))
    return log_ratio * advantages if flip else -log_ratio * advantages

  bound = functools.partial(surrogate, count=2**24 + 1, flip=True)
  objective = gpo.dapo().replace(surrogate=bound)
  assert jnp.isfinite(run_plain(objective))
  assert all(count == 2**24 + 1 and flip is True for count, flip in seen)


def run_plain(objective):
  return objective(BATCH.log_probs, BATCH.prepare(objective))[0]


def test_an_objective_as_a_static_argument_compiles_anew():
  rollout, traces = BATCH.prepare(gpo.dapo()), []

  def loss(objective, log_probs):
    traces.append(objective)
    return objective(log_probs, rollout)[0]

  assert repr(gpo.dapo()) == repr(gpo.dapo())
  static = jax.jit(loss, static_argnums=0)
  for _ in range(2):
    static(gpo.dapo(), BATCH.log_probs)
  assert len(traces) == 2
  for argument in (jax.jit(loss), jax.jit(lambda _, x: loss(gpo.dapo(), x))):
    traces.clear()
    for _ in range(2):
      argument(gpo.dapo(), BATCH.log_probs)
    assert len(traces) == 1
