"""Weightings by hand, by loops, of packed rows, and of nothing."""

import functools

import jax
import numpy as np
import pytest

from gpo_jax import weightings

MASK = np.array([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0]], bool)
WEIGHTINGS = {
  "token_mean": weightings.token_mean,
  "sequence_mean": weightings.sequence_mean,
  "sequence_sum": weightings.sequence_sum,
  "constant_length": functools.partial(weightings.constant_length, length=8),
  "token_sum": weightings.token_sum,
}
EVERY = pytest.mark.parametrize("name", WEIGHTINGS)
BY_HAND = {  # of a response of n tokens, of 6 tokens in 3 responses that count
  "token_mean": lambda n: 1 / 6,
  "sequence_mean": lambda n: 1 / (3 * n),
  "sequence_sum": lambda n: 1 / 3,
  "constant_length": lambda n: 1 / (8 * 3),
  "token_sum": lambda n: 1.0,
}


@EVERY
def test_weights_by_hand(name):
  expected = [[BY_HAND[name](max(row.sum(), 1)) if active else 0 for active in row] for row in MASK]
  np.testing.assert_allclose(WEIGHTINGS[name](MASK), expected, rtol=1e-6)


@EVERY
def test_a_packed_response_weighs_what_it_weighs_alone(name):
  ids = np.repeat(np.array([[1, 2], [1, 2]]), 4, axis=1)
  packed = WEIGHTINGS[name](MASK.reshape(2, 8), ids)
  np.testing.assert_allclose(np.reshape(packed, (4, 4)), WEIGHTINGS[name](MASK), rtol=1e-6)


@EVERY
def test_masked_tokens_of_a_packed_row_may_have_any_id(name):
  mask, ids = np.array([[0, 1, 0, 1, 1, 0, 1]], bool), np.array([[5, 1, 0, 1, 2, 1, 2]])
  filled = WEIGHTINGS[name](mask, np.array([[1, 1, 1, 1, 2, 2, 2]]))
  np.testing.assert_array_equal(WEIGHTINGS[name](mask, ids), filled)


@EVERY
def test_leading_axes_share_one_denominator(name):
  flat = WEIGHTINGS[name](MASK)
  np.testing.assert_array_equal(WEIGHTINGS[name](MASK.reshape(2, 2, 4)).reshape(4, 4), flat)


@EVERY
def test_a_batch_without_a_token_weighs_0(name):
  np.testing.assert_array_equal(WEIGHTINGS[name](np.zeros_like(MASK)), 0)
  ids = np.array([[1, 1, 2, 2]] * 4)
  np.testing.assert_array_equal(WEIGHTINGS[name](np.zeros_like(MASK), ids), 0)


@EVERY
def test_padding_to_a_longer_row_changes_nothing(name):
  wide = np.pad(MASK, ((0, 1), (0, 3)))
  np.testing.assert_array_equal(WEIGHTINGS[name](wide)[:4, :4], WEIGHTINGS[name](MASK))


def test_a_length_may_be_traced():
  weigh = jax.jit(lambda length: weightings.constant_length(MASK, length=length))
  np.testing.assert_allclose(weigh(8), WEIGHTINGS["constant_length"](MASK), rtol=1e-6)


@pytest.mark.parametrize("name", ["token_mean", "sequence_mean", "sequence_sum"])
def test_counts_beyond_2_to_the_24_are_not_lost(name):
  """A float32 that counts one by one stops at 16,777,216."""
  rows, length = (2**13 + 8, 2**11 + 1) if name != "sequence_sum" else (2**24 + 2**10, 1)
  mask = np.ones((rows, length), bool)
  weight = float(jax.jit(WEIGHTINGS[name])(mask)[0, 0])
  expected = 1 / (rows if name == "sequence_sum" else rows * length)
  np.testing.assert_allclose(weight, expected, rtol=2e-7)
