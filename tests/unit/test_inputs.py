"""What arguments may be: arrays, numbers and lists; everything else is one clear error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax._inputs import as_size

MASK = np.ones((1, 2, 3), bool)
REWARDS = np.array([[1.0, 0.0]], np.float32)


def test_a_missing_reward_is_named_with_its_remedy():
  with pytest.raises(ValueError, match=r"rewards .*None.*use NaN and mask that response out"):
    gpo.grpo().prepare([[1.0, None]], MASK)


NOT_ARRAYS = {
  "masked_array": (np.ma.masked_array(REWARDS), "rewards must not be a masked array"),
  "long_double": (REWARDS.astype(np.longdouble), "of a dtype that JAX has; got <f16"),
  "big_endian": (REWARDS.astype(">f4"), "of a dtype that JAX has; got >f4"),
  "ragged": ([[1.0], [1.0, 2.0]], "rewards must be a rectangular array of real numbers"),
  "text": ([["a", "b"]], "rewards must hold real numbers; got text"),
  "complex": (REWARDS.astype(complex), "rewards must hold real numbers; got dtype complex128"),
}


@pytest.mark.parametrize("case", NOT_ARRAYS)
def test_what_is_not_an_array_of_real_numbers(case):
  rewards, message = NOT_ARRAYS[case]
  with pytest.raises(ValueError, match=message):
    gpo.grpo().prepare(rewards, MASK)


def test_a_list_of_traced_values_says_what_it_is():
  step = jax.jit(lambda r: gpo.grpo().prepare([[r, 0.0]], MASK).advantages)
  with pytest.raises(ValueError, match="rewards must be a rectangular array of real numbers"):
    step(1.0)


LOG_PROBS = ("log_probs", "old_log_probs", "ref_log_probs", "sampler_log_probs")


@pytest.mark.parametrize("name", LOG_PROBS)
@pytest.mark.parametrize("ids", [np.array([[[3, 1, 4], [1, 5, 9]]]), jnp.ones((1, 2, 3), bool)])
def test_token_ids_are_not_taken_for_log_probabilities(name, ids):
  objective, log_probs = gpo.dapo(), np.full((1, 2, 3), -1.0, np.float32)
  given = {key: ids if key == name else log_probs for key in LOG_PROBS}
  with pytest.raises(ValueError, match=rf"{name} must hold floats; got dtype .*not token ids"):
    current = given.pop("log_probs")
    objective(current, objective.prepare(REWARDS, MASK, **given))


def test_ids_that_all_differ_are_groups_of_one():
  rewards, mask = np.ones((2, 2), np.float32), np.ones((2, 2, 3), bool)
  ids = np.arange(4).reshape(2, 2)
  with pytest.raises(ValueError, match="group_ids must name groups .*got 4 groups of one.*same id"):
    gpo.dapo().prepare(rewards, mask, group_ids=ids)
  jax.jit(lambda ids: gpo.dapo().prepare(rewards, mask, group_ids=ids).advantages)(ids)


def test_several_kinds_of_reward_are_stacked():
  objective = gpo.dapo().replace(advantage=gpo.advantages.decoupled)
  with pytest.raises(
    ValueError, match=r"rewards must hold several kinds, \[K, 1, 2\].*got \[1, 2\]"
  ):
    objective.prepare(REWARDS, MASK)


BAD_MASKS = {
  "of_1_and_minus_1": (np.where(np.arange(3) < 2, 1, -1) * np.ones(MASK.shape, int), "-1"),
  "of_a_half": (np.full(MASK.shape, 0.5), "0.5"),
  "additive": (np.where(np.arange(3) < 2, 0.0, -1e9) + np.zeros(MASK.shape), "-1000000000"),
  "of_counts": (jnp.full(MASK.shape, 2), "2"),
  "of_nan": (np.full(MASK.shape, np.nan), "nan"),
}


@pytest.mark.parametrize("case", BAD_MASKS)
def test_a_mask_is_bools_or_0_and_1(case):
  mask, value = BAD_MASKS[case]
  with pytest.raises(ValueError, match=rf"mask must hold bools or 0 and 1; got {value}"):
    gpo.grpo().prepare(REWARDS, mask)
  with pytest.raises(ValueError, match="mask must hold bools or 0 and 1"):
    gpo.weightings.token_mean(mask)


def test_a_traced_mask_is_taken_as_it_is():
  weights = jax.jit(gpo.weightings.token_sum)(jnp.array([[0.5, 0.0, -1.0]]))
  np.testing.assert_array_equal(weights, [[1, 0, 1]])


@pytest.mark.parametrize("size", [0, -1, 1.0, True, None])
def test_a_size_is_an_integer_of_at_least_1(size):
  assert as_size("chunk_size", 1) == 1
  with pytest.raises(ValueError, match="chunk_size must be an integer of at least 1; got "):
    as_size("chunk_size", size)
