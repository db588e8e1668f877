"""What fills a slot, and the errors of what does not."""

import functools

import jax.numpy as jnp
import optax
import pytest

import gpo_jax as gpo
from gpo_jax import corrections, divergences, levels, surrogates, weightings
from tests.support.batches import batch, value_and_grad

BATCH = batch()


def run(objective, data=BATCH, **changes):
  return value_and_grad(objective, data.log_probs, data.prepare(objective, **changes))


def test_bad_objectives():
  with pytest.raises(ValueError, match=r"level=sequence .*weighting=token_mean.*sequence_mean"):
    gpo.gspo().replace(weighting=weightings.token_mean)
  for level in (levels.sequence_product, functools.partial(levels.clipped_sequence, low=0.1)):
    with pytest.raises(ValueError, match="allow_token_weighting=True"):
      gpo.dapo().replace(level=level)
  allowed = gpo.gspo().replace(weighting=weightings.token_mean, allow_token_weighting=True)
  assert jnp.isfinite(run(allowed)[0])
  assert allowed.replace(beta=None).allow_token_weighting
  gpo.dapo().replace(level=levels.sequence_token)
  with pytest.raises(ValueError, match=r"divergence=k3, beta=None. Pass both"):
    gpo.grpo().replace(beta=None)
  with pytest.raises(ValueError, match=r"divergence=None, beta=0.1"):
    gpo.dapo().replace(beta=0.1)
  with pytest.raises(ValueError, match="surrogate must be a function; got 'clip'"):
    gpo.dapo().replace(surrogate="clip")
  with pytest.raises(ValueError, match="epsilon_low must hold real numbers"):
    gpo.dapo(epsilon_low="0.2")


WRONG_SLOTS = {
  "a_level": (
    {"surrogate": levels.sequence},
    r"\(log_ratio, advantages\); sequence takes \(log_ratio, rollout",
  ),
  "unknown_number": (
    {"surrogate": functools.partial(surrogates.clip, epsilon=0.2)},
    r"clip\(epsilon=0.2\) does not:",
  ),
  "missing_number": (
    {"surrogate": surrogates.cispo},
    "surrogate must take .*; cispo does not: .*'high'",
  ),
  "a_divergence": (
    {"level": divergences.k3},
    r"level must take \(log_ratio, rollout\); k3 does not",
  ),
  "a_weighting_without_ids": (
    {"weighting": lambda mask: mask},
    r"weighting must take \(mask, segment_ids\); <lambda> does not",
  ),
  "by_group": (
    {"advantage": gpo.advantages.by_group},
    "advantage must take .*; by_group does not",
  ),
  "the_second_correction": (
    {"corrections": (corrections.topr, lambda x: x)},
    "corrections must take .*; <lambda> does not",
  ),
  "entropy_mask": (
    {"corrections": (functools.partial(corrections.entropy_mask, quantile=0.5),)},
    r"entropy_mask.* takes \(entropy, rollout\): pass rollout.replace\(factor=entropy_mask\(",
  ),
  "sequence_exact": (
    {"divergence": divergences.sequence_exact},
    r"takes \(kl, .*: bind the KL: lambda _, log_ratio",
  ),
}


@pytest.mark.parametrize("case", WRONG_SLOTS)
def test_a_function_that_does_not_fit_its_slot(case):
  slot, message = WRONG_SLOTS[case]
  with pytest.raises(ValueError, match=message):
    gpo.grpo().replace(**slot)


def test_a_slot_takes_whatever_can_be_called_as_it_is():
  objective = gpo.dapo().replace(surrogate=jnp.multiply, advantage=lambda *given: given[0])
  assert jnp.isfinite(run(objective)[0])
  objective.replace(surrogate=min)  # a builtin whose arguments are not known


NOT_ARRAYS = {"None": None, "tuple": (1.0,), "float": 1.0}


@pytest.mark.parametrize("got", NOT_ARRAYS)
def test_what_a_slot_returns_is_an_array(got):
  function = lambda *_: NOT_ARRAYS[got]
  rollout = BATCH.prepare(gpo.grpo())
  for slot in ("surrogate", "level", "divergence"):
    with pytest.raises(ValueError, match=rf"{slot} must return float32 \[4, 4, 6\].*got {got}"):
      gpo.grpo().replace(**{slot: function})(BATCH.log_probs, rollout)
  with pytest.raises(ValueError, match=f"corrections: <lambda> must return .*got {got}"):
    gpo.grpo().replace(corrections=(function,))(BATCH.log_probs, rollout)
  for slot, shape in (("advantage", r"\[4, 4\]"), ("weighting", r"\[4, 4, 6\]")):
    with pytest.raises(ValueError, match=f"{slot} must return {shape}.*got {got}"):
      BATCH.prepare(gpo.grpo().replace(**{slot: function}))


def test_numbers_of_weighting_and_advantage_are_scalars_and_lengths_are_arrays():
  for slot, message in (
    ({"weighting": functools.partial(weightings.constant_length, length=jnp.ones(6))}, "length"),
    ({"advantage": functools.partial(gpo.advantages.standardize, eps=jnp.ones(4))}, "eps"),
  ):
    with pytest.raises(ValueError, match=rf"{message} must be a scalar; got shape .*jax.vmap"):
      BATCH.prepare(gpo.dapo().replace(**slot))
  opo = functools.partial(gpo.advantages.optimal_baseline, lengths=BATCH.mask.sum(-1))
  assert jnp.isfinite(run(gpo.dapo().replace(advantage=opo))[0])


def test_bad_settings_say_what_to_do():
  with pytest.raises(ValueError, match=r"beta=schedule\(step\)"):
    gpo.grpo(beta=optax.schedules.linear_schedule(0.1, 0.0, 5))
  for bad in (corrections.topr, None, (1.0,)):
    with pytest.raises(ValueError, match="corrections must be a tuple of functions"):
      gpo.dapo().replace(corrections=bad)
  with pytest.raises(ValueError, match=r"mode must hold real numbers.*close over anything else"):
    gpo.dapo().replace(surrogate=functools.partial(surrogates.clip, mode="x"))
  with pytest.raises(ValueError, match=r"beta must be a scalar; got shape \[2\]"):
    gpo.grpo(beta=jnp.ones(2))(BATCH.log_probs, BATCH.prepare(gpo.grpo()))
  for name, make in (("epsilon_low", gpo.grpo), ("epsilon_high", gpo.dapo), ("high", gpo.cispo)):
    with pytest.raises(ValueError, match=f"{name} must be a scalar.*jax.vmap"):
      make(**{name: jnp.ones(6)})
    if name != "epsilon_high":  # there None means epsilon_low
      with pytest.raises(ValueError, match=f"{name} of .* must be a number; got None: bind"):
        make(**{name: None})
  level = functools.partial(levels.clipped_sequence, low=jnp.ones(6))
  importance = functools.partial(corrections.truncate_importance, level=level)
  for slot in ({"corrections": (importance,)}, {"level": level}):
    with pytest.raises(ValueError, match=r"low must be a scalar; got shape \[6\]"):
      gpo.gmpo().replace(**slot)
  for slot, function, message in (
    ("corrections", functools.partial(corrections.reject, high=1.0, statistic=3.0), "a function"),
    ("corrections", functools.partial(corrections.truncate_importance, level=1.0), "a function"),
    (
      "surrogate",
      functools.partial(surrogates.clip, epsilon_low=levels.token),
      "a number; got token",
    ),
  ):
    with pytest.raises(ValueError, match=f"of {function.func.__name__} must be {message}"):
      gpo.dapo().replace(**{slot: (function,) if slot == "corrections" else function})
  with pytest.raises(ValueError, match="level must return"):
    gpo.dapo().replace(level=lambda d, r: d[..., :1])(BATCH.log_probs, BATCH.prepare(gpo.dapo()))


def test_a_function_of_ones_own_may_have_arrays_and_none():
  def tabled(log_ratio, advantages, *, table, kind=None, **others):
    return log_ratio * advantages * jnp.mean(table)

  bound = functools.partial(tabled, table=jnp.ones(3), kind=None, other=None)
  objective = gpo.dapo().replace(surrogate=bound)
  assert jnp.isfinite(run(objective)[0])
