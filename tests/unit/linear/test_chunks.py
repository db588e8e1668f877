"""The loop over chunks: every active token once, none that is masked, in any shape and tiling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpo_jax as gpo
from gpo_jax.linear.chunks import _over_chunks, as_tiling, compact
from gpo_jax.linear.mesh import Layout
from gpo_jax.linear.two_passes import Slopes
from tests.support import linear
from tests.support.batches import PRESETS
from tests.support.linear import TILINGS, assert_same


@functools.cache
def wanted(shape=linear.MASK.shape, vocabulary=linear.VOCABULARY, seed=0):
  """A batch of a shape, and the value and gradients that it has by way of the full logits."""
  hidden, unembedding, bias, tokens = linear.draw(seed, shape, vocabulary)
  rng = np.random.default_rng(seed)
  mask = rng.random(shape) < 0.6
  slopes = jnp.asarray(rng.normal(size=shape), jnp.float32)

  def total(outputs):
    return jnp.sum(jnp.where(mask, slopes * outputs.log_probs + outputs.entropy**2, 0)), None

  from_logits = lambda *state: total(linear.log_probs_of(*state, tokens))
  return (
    (hidden, unembedding, bias),
    tokens,
    mask,
    total,
    run(from_logits, hidden, unembedding, bias),
  )


def run(function, *state):
  return linear.step(function, argnums=(0, 1, 2))(*state)


def check(tiling, *batch):
  state, tokens, mask, total, expected = wanted(*batch)

  def from_hidden(hidden, unembedding, bias):
    head = gpo.Head(unembedding, bias, **linear.SETTINGS)
    return total(gpo.linear_token_log_probs(hidden, head, tokens, mask=mask, tiling=tiling))

  found = run(from_hidden, *state)
  np.testing.assert_allclose(found[0][0], expected[0][0], rtol=2e-5, atol=2e-5)
  assert_same(found[1], expected[1], 2e-5)


@pytest.mark.quick("tiles")
@pytest.mark.parametrize("name", TILINGS)
def test_a_tiling_changes_nothing(name):
  check(TILINGS[name])


SHAPES = {
  "one_token_of_one_entry": ((1, 1), 1, gpo.Tiling()),
  "one_entry_at_a_time": ((2, 3), 5, gpo.Tiling(2, 1)),
  "one_token_at_a_time": ((2, 3), 5, gpo.Tiling(1, 5)),
  "a_last_chunk_and_tile_of_one": ((1, 9), 9, gpo.Tiling(4, 4)),
  "chunks_of_two_sizes": ((3, 171), 40, gpo.Tiling(256, 16)),
}


@pytest.mark.quick("one_token_of_one_entry", "chunks_of_two_sizes", "a_last_chunk_and_tile_of_one")
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
  shape, vocabulary, tiling = SHAPES[name]
  check(tiling, shape, vocabulary, 3)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
  st.tuples(st.integers(1, 3), st.integers(1, 400)), st.integers(1, 40),
  st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_and_tiling(shape, vocabulary, chunk_size, tile_size, seed):
  check(gpo.Tiling(chunk_size, tile_size), shape, vocabulary, seed)


# --- how much is computed ------------------------------------------------------------------------


def chunks_run(mask, tiling, chip=False):
  """The sizes of the chunks that run, in order."""
  size, width, vocabulary = mask.size, 4, 8
  hidden, unembedding, _, tokens = linear.draw(0, (size,), vocabulary, width)
  hidden = jnp.where(mask[:, None], hidden, jnp.nan)
  head = gpo.Head(unembedding, None, None, jnp.float32(1))
  seen = []

  def slopes(log_probs, counts):
    record = lambda counts: seen.append((counts.size, int(counts.sum())))
    jax.debug.callback(record, counts, ordered=True)
    return Slopes(jnp.ones_like(log_probs), None)

  @jax.jit
  def run(hidden, mask):
    known = jnp.ones(size, bool)
    return _over_chunks(tiling, Layout(), slopes, chip, hidden, head, tokens, known, mask, mask)

  outputs, _, gradients = run(hidden, jnp.asarray(mask))
  jax.block_until_ready(gradients)
  jax.effects_barrier()
  assert not jnp.isnan(gradients.hidden).any()
  assert (np.asarray(outputs.log_probs)[mask] < 0).all()
  assert (np.asarray(outputs.log_probs)[~mask] == 0).all()
  assert sum(count for _, count in seen) == mask.sum()
  return [size for size, _ in seen]


def some(active, size, place):
  mask = np.zeros(size, bool)
  at = {"first": np.arange(active), "last": np.arange(size - active, size)}
  at["scattered"] = np.random.default_rng(0).permutation(size)[:active]
  mask[at[place]] = True
  return mask


@pytest.mark.quick("0-sizes0", "717-sizes4", "897-sizes6")
@pytest.mark.parametrize(
  ("active", "sizes"),
  [
    (0, []),
    (1, [128]),
    (512, [512]),
    (513, [512, 128]),
    (717, [512, 128, 128]),
    (896, [512, 128, 128, 128]),
    (897, [512, 512]),
    (1024, [512, 512]),
  ],
)
def test_chunks_are_as_many_as_the_active_tokens_fill_and_the_last_ones_smaller(active, sizes):
  """717 of 1,024 tokens cost 768: not two chunks of 512."""
  assert chunks_run(some(active, 1024, "scattered"), gpo.Tiling(512)) == sizes


@pytest.mark.quick("0-sizes0", "717-sizes4", "513-sizes3")
@pytest.mark.parametrize(
  ("active", "sizes"),
  [
    (0, [512]),
    (1, [512]),
    (511, [512]),
    (513, [512, 128]),
    (717, [512, 128, 128]),
    (1500, [512, 512, 512]),
  ],
)
def test_on_a_chip_the_first_chunk_always_runs_and_no_token_runs_twice(active, sizes):
  assert chunks_run(some(active, 2048, "scattered"), gpo.Tiling(512), chip=True) == sizes


@pytest.mark.parametrize("place", ["first", "last"])
def test_masked_tokens_cost_nothing_wherever_they_are(place):
  assert chunks_run(some(10, 64, place), gpo.Tiling(8)) == [8, 8]


def test_active_tokens_come_first_in_order():
  mask = some(9, 23, "scattered")
  order, rank, active = compact(jnp.asarray(mask), 5)
  assert active == 9
  assert order.size == 25
  np.testing.assert_array_equal(order[:9], np.flatnonzero(mask))
  assert (order[9:] >= 23).all()
  np.testing.assert_array_equal(rank[mask], np.arange(9))
  assert (rank[~mask] >= 25).all()


@pytest.mark.quick("grpo")
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_memory_is_a_chunk_of_logits_whatever_the_batch(name):
  rows, length, vocabulary, width, chunk_size = 8, 512, 8192, 64, 128
  objective, shape = PRESETS[name], (1, rows, length)
  zeros = np.zeros(shape)
  rollout = objective.prepare(np.eye(1, rows), np.ones(shape), zeros, ref_log_probs=zeros)
  tokens = jnp.zeros(shape, int)

  def loss(hidden, unembedding):
    how = {"tiling": gpo.Tiling(chunk_size, 1024)}
    return gpo.linear_loss(objective, hidden, unembedding, tokens, rollout, **how)[0]

  def from_logits(hidden, unembedding):
    return objective(gpo.token_log_probs(hidden @ unembedding.T, tokens), rollout)[0]

  shapes = ((*shape, width), (vocabulary, width))
  promised = 4 * chunk_size * vocabulary + 16e6
  grad = functools.partial(jax.value_and_grad, argnums=(0, 1))
  assert linear.temporaries(grad(loss), *shapes) < promised
  assert linear.temporaries(loss, *shapes) < 16e6  # no gradient: one tile
  every_logit = 4 * rows * length * vocabulary
  assert linear.temporaries(grad(from_logits), *shapes) > every_logit


# --- wrong input ---------------------------------------------------------------------------------

WRONG = {
  "chunk_size_0": (gpo.Tiling(0), "chunk_size must be an integer of at least 1; got 0"),
  "tile_size_of_a_half": (gpo.Tiling(tile_size=0.5), "tile_size must be an integer of at least 1"),
  "chunk_size_true": (gpo.Tiling(True), "chunk_size must be an integer of at least 1; got True"),
  "a_number": (512, r"tiling must be a Tiling; got 512: pass gpo.Tiling\(chunk_size=1024\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tilings_are_named(name):
  tiling, message = WRONG[name]
  with pytest.raises(ValueError, match=message):
    as_tiling(tiling)
  with pytest.raises(ValueError, match=message):
    gpo.linear_token_log_probs(linear.HIDDEN, linear.UNEMBEDDING, linear.TOKENS, tiling=tiling)
  with pytest.raises(ValueError, match=message):
    gpo.linear_divergence(gpo.vocabulary.kl, *linear.STATES[:2], *linear.STATES[:2], tiling=tiling)


def test_sizes_of_numpy_are_sizes():
  assert as_tiling(gpo.Tiling(np.int64(7), None)) == (7, None, False)
