"""Log-probabilities from logits and from hidden states: exact, invisible padding, no `[T, V]`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gpo_jax as gpo
from gpo_jax import _linear_grad
from tests.batches import PRESETS, batch, relative_error

HIDDEN, VOCABULARY = 16, 53
SETTINGS = {"temperature": 0.7, "softcap": 3.0}
# Chunks and tiles that divide neither tokens nor vocabulary, one chunk for all, one tile for all.
TILINGS = {
  "compact": {"chunk_size": 7, "tile_size": 10, "compact": True},
  "compact, one chunk": {"chunk_size": 500, "tile_size": 10, "compact": True},
  "slices": {"chunk_size": 128, "tile_size": 20, "compact": False},
  "slices, one tile": {"chunk_size": 48, "tile_size": VOCABULARY, "compact": False},
  "default": {},
}
BATCH = batch(prompts=8)
MASK = BATCH.mask


def draw(seed=0, shape=MASK.shape, vocabulary=VOCABULARY, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  hidden = jnp.asarray(rng.normal(size=(*shape, HIDDEN)), dtype)
  unembedding = jnp.asarray(rng.normal(size=(vocabulary, HIDDEN)) / 2, dtype)
  bias = jnp.asarray(rng.normal(size=vocabulary), dtype)
  tokens = jnp.asarray(rng.integers(0, vocabulary, shape))
  return hidden, unembedding, bias, tokens


HIDDEN_STATES, UNEMBEDDING, BIAS, TOKENS = draw()


def numpy_log_softmax(logits, temperature=1.0, where=None, softcap=None):
  z = np.asarray(logits, np.float64)
  z = z if softcap is None else softcap * np.tanh(z / softcap)
  z = z / temperature
  z = z if where is None else np.where(where, z, -np.inf)
  shifted = z - z.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def numpy_entropy(log_probs):
  p = np.exp(log_probs)
  return -np.sum(np.where(p > 0, p * np.where(p > 0, log_probs, 0), 0), -1)


def pick(x, tokens):
  return np.take_along_axis(np.asarray(x), np.asarray(tokens)[..., None], -1)[..., 0]


# --- from logits
# -------------------------------------------------------------------------------------

SUPPORT = np.random.default_rng(5).random((*MASK.shape, VOCABULARY)) < 0.6


@pytest.mark.parametrize(
  "setting",
  [{}, {"temperature": 0.3}, {"softcap": 2.0}, {"where": SUPPORT}, SETTINGS | {"where": SUPPORT}],
)
def test_log_probs_entropy_and_kl_are_the_formulas(setting):
  rng = np.random.default_rng(1)
  logits = rng.normal(size=SUPPORT.shape).astype(np.float32) * 3
  other = rng.normal(size=SUPPORT.shape).astype(np.float32) * 3
  expected, reference = (numpy_log_softmax(x, **setting) for x in (logits, other))
  found = gpo.token_log_probs(logits, TOKENS, **setting)
  np.testing.assert_allclose(found, pick(expected, TOKENS), rtol=1e-5, atol=1e-6)
  entropy = gpo.token_entropy(logits, **setting)
  np.testing.assert_allclose(entropy, numpy_entropy(expected), rtol=1e-5, atol=1e-6)
  p = np.exp(expected)
  kl = np.sum(p * np.where(p > 0, expected - np.where(p > 0, reference, 0), 0), -1)
  np.testing.assert_allclose(gpo.exact_kl(logits, other, **setting), kl, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_logits_of_any_dtype_are_computed_in_float32(dtype):
  logits = jnp.asarray(np.random.default_rng(2).normal(size=(4, 500)) * 5, dtype)
  found = gpo.token_log_probs(logits, jnp.arange(4))
  assert found.dtype == jnp.float32
  expected = pick(numpy_log_softmax(logits.astype(jnp.float32)), np.arange(4))
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  gradient = jax.grad(lambda x: jnp.sum(gpo.token_log_probs(x, jnp.arange(4))))(logits)
  assert gradient.dtype == dtype


@pytest.mark.usefixtures("x64")
def test_float64_stays_float64():
  logits = np.random.default_rng(2).normal(size=(4, 50))
  found = gpo.token_log_probs(logits, np.arange(4))
  np.testing.assert_allclose(found, pick(numpy_log_softmax(logits), np.arange(4)), rtol=1e-14)
  hidden, unembedding, _, tokens = draw(dtype=jnp.float64)
  outputs = gpo.linear_token_log_probs(hidden, unembedding, tokens, tile_size=10)
  expected = numpy_log_softmax(np.asarray(hidden) @ np.asarray(unembedding).T)
  np.testing.assert_allclose(outputs.log_probs, pick(expected, tokens), rtol=1e-12)
  np.testing.assert_allclose(outputs.entropy, numpy_entropy(expected), rtol=1e-12)


def test_a_token_outside_the_support_is_minus_infinity_and_one_outside_the_vocabulary_nan():
  support = jnp.array([True, True, False])
  found = gpo.token_log_probs(jnp.zeros((4, 3)), jnp.array([2, 0, 3, -1]), where=support)
  np.testing.assert_array_equal(found, [-np.inf, np.float32(-np.log(2)), np.nan, np.nan])
  hidden, unembedding = jnp.zeros((4, 2)), jnp.zeros((3, 2))
  tokens, bias = jnp.array([2, 0, 3, -1]), jnp.array([0.0, 0.0, -jnp.inf])
  for tile_size in (1, 2, 3):
    found = gpo.linear_token_log_probs(hidden, unembedding, tokens, bias=bias, tile_size=tile_size)
    np.testing.assert_array_equal(
      found.log_probs, [-np.inf, np.float32(-np.log(2)), np.nan, np.nan]
    )
    np.testing.assert_allclose(found.entropy, np.log(2), rtol=1e-6)


def test_gradients_are_finite_at_banned_tokens():
  logits = jnp.array([[0.0, 1.0, -jnp.inf], [2.0, -jnp.inf, -jnp.inf]])
  with jax.debug_nans(True):
    for function in (gpo.token_entropy, lambda x: gpo.token_log_probs(x, jnp.array([1, 0]))):
      gradient = jax.grad(lambda x: jnp.sum(function(x)))(logits)
      assert np.isfinite(gradient).all()
      assert (np.asarray(gradient)[np.isinf(logits)] == 0).all()


def test_padded_logits_are_invisible_under_where():
  mask = jnp.array([True, False])
  logits = jnp.array([[0.0, 1.0, 2.0], [jnp.nan, jnp.inf, 0.0]])

  def loss(logits):
    kept = {"where": mask[:, None]}
    terms = gpo.token_log_probs(logits, jnp.array([0, 7]), **kept)
    terms += gpo.token_entropy(logits, **kept) + gpo.exact_kl(logits, jnp.ones((2, 3)), **kept)
    return jnp.sum(jnp.where(mask, terms, 0))

  gradient = jax.grad(loss)(logits)
  assert np.isfinite(gradient).all()
  assert (np.asarray(gradient)[1] == 0).all()


# --- from hidden states: parity
# ----------------------------------------------------------------------


def plain_loss(objective, hidden, unembedding, bias, rollout, tokens=TOKENS):
  logits = hidden @ unembedding.T + jnp.expand_dims(bias, range(tokens.ndim))
  return objective(gpo.token_log_probs(logits, tokens, **SETTINGS), rollout)[0]


def linear_loss(objective, hidden, unembedding, bias, rollout, tokens=TOKENS, **tiling):
  return gpo.linear_loss(
    objective, hidden, unembedding, tokens, rollout, bias=bias, **SETTINGS, **tiling
  )[0]


def step(loss, **tiling):
  return jax.jit(jax.value_and_grad(functools.partial(loss, **tiling), argnums=(1, 2, 3)))


def assert_same(found, expected, tolerance=1e-5):
  np.testing.assert_allclose(found[0], expected[0], rtol=tolerance, atol=tolerance)
  for x, y in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1])):
    assert x.shape == y.shape
    assert x.dtype == y.dtype
    assert relative_error(x, y) < tolerance


def near(objective):
  """A rollout whose old policy is near the one of the hidden states."""
  logits = HIDDEN_STATES @ UNEMBEDDING.T + BIAS[None, None, None]
  log_probs = gpo.token_log_probs(logits, TOKENS, **SETTINGS)
  rng = np.random.default_rng(3)
  names = ("old_log_probs", "ref_log_probs", "sampler_log_probs")
  noisy = {n: log_probs + rng.normal(0, 0.3, MASK.shape).astype(np.float32) for n in names}
  return BATCH.prepare(objective, **noisy)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("tiling", ["compact", "slices"])
def test_every_preset_is_what_it_is_from_logits(name, tiling):
  objective = PRESETS[name]
  rollout = near(objective)
  arguments = (objective, HIDDEN_STATES, UNEMBEDDING, BIAS, rollout)
  expected = step(plain_loss)(*arguments)
  assert_same(step(linear_loss, **TILINGS[tiling])(*arguments), expected)
  assert np.any(expected[1][1])


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("preset", ["grpo", "gspo"])
def test_what_is_masked_is_bitwise_invisible(preset, tiling):
  objective = PRESETS[preset]
  rollout = near(objective)
  run = step(linear_loss, **TILINGS[tiling])
  expected = run(objective, HIDDEN_STATES, UNEMBEDDING, BIAS, rollout, TOKENS)
  assert_same(expected, step(plain_loss)(objective, HIDDEN_STATES, UNEMBEDDING, BIAS, rollout))
  for garbage, token in [(np.nan, -100), (np.inf, 10**6), (1e30, 3)]:
    hidden = jnp.where(MASK[..., None], HIDDEN_STATES, garbage)
    found = run(objective, hidden, UNEMBEDDING, BIAS, rollout, jnp.where(MASK, TOKENS, token))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert (np.asarray(expected[1][0])[~MASK] == 0).all()


@pytest.mark.parametrize("tiling", TILINGS)
def test_log_probs_and_entropy_are_differentiable(tiling):
  def loss(of, hidden, unembedding, bias):
    outputs = of(hidden, unembedding, bias)
    return jnp.sum(jnp.where(MASK, outputs.log_probs * 0.3 + outputs.entropy**2, 0))

  def plain(hidden, unembedding, bias):
    logits = hidden @ unembedding.T + bias[None, None, None]
    entropy = gpo.token_entropy(logits, **SETTINGS)
    return gpo.TokenLogProbs(gpo.token_log_probs(logits, TOKENS, **SETTINGS), entropy)

  def linear(hidden, unembedding, bias):
    return gpo.linear_token_log_probs(
      hidden, unembedding, TOKENS, mask=MASK, bias=bias, **SETTINGS, **TILINGS[tiling]
    )

  arguments = (HIDDEN_STATES, UNEMBEDDING, BIAS)
  outputs, expected = linear(*arguments), plain(*arguments)
  for x, y in zip(outputs, expected):
    np.testing.assert_allclose(x, jnp.where(MASK, y, 0), rtol=1e-5, atol=1e-6)
  for terms in ("log_probs", "entropy"):  # and alone: the other's slope is then symbolic
    part = lambda of, *x: jnp.sum(jnp.where(MASK, getattr(of(*x), terms), 0))
    x, y = (jax.grad(part, argnums=(1, 2, 3))(of, *arguments) for of in (linear, plain))
    assert_same((0, x), (0, y))
  value_and_grad = jax.value_and_grad(loss, argnums=(1, 2, 3))
  assert_same(value_and_grad(linear, *arguments), value_and_grad(plain, *arguments))


def test_terms_and_entropy_come_with_the_loss():
  objective = PRESETS["grpo"]
  rollout = near(objective)
  logits = HIDDEN_STATES @ UNEMBEDDING.T
  expected = objective(gpo.token_log_probs(logits, TOKENS), rollout)
  loss, terms = gpo.linear_loss(objective, HIDDEN_STATES, UNEMBEDDING, TOKENS, rollout)
  np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
  np.testing.assert_allclose(terms.gate, expected[1].gate, rtol=1e-4, atol=1e-5)
  entropy = numpy_entropy(numpy_log_softmax(logits))
  np.testing.assert_allclose(terms.entropy[MASK], entropy[MASK], rtol=1e-5)
  metrics = gpo.summarize(terms, rollout)
  np.testing.assert_allclose(metrics["entropy"], entropy[MASK].mean(), rtol=1e-5)
  assert "entropy" not in gpo.summarize(expected[1], rollout)


def test_an_objective_s_numbers_are_differentiable():
  objective = gpo.grpo()
  rollout = near(objective)
  arguments = (objective, HIDDEN_STATES, UNEMBEDDING, BIAS, rollout)
  found, expected = jax.grad(linear_loss)(*arguments), jax.grad(plain_loss)(*arguments)
  assert jax.tree.leaves(expected)[0] != 0
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), found, expected)


@pytest.mark.parametrize("offset", [0, 300, 10_000])
def test_log_probs_keep_their_digits_however_large_logits_are(offset):
  rng = np.random.default_rng(0)
  logits = (rng.normal(size=(64, 32)) + offset).astype(np.float32)
  tokens = np.arange(64) % 32
  expected = pick(numpy_log_softmax(logits), tokens)
  linear = lambda h: gpo.linear_token_log_probs(h, jnp.eye(32), tokens, tile_size=10).log_probs
  plain = lambda z: gpo.token_log_probs(z, tokens)
  slope = np.eye(32)[tokens] - np.exp(numpy_log_softmax(logits))
  for f in (plain, linear):
    np.testing.assert_allclose(f(logits), expected, atol=2e-6)
    found = jax.grad(lambda x, f=f: jnp.sum(f(x)))(jnp.asarray(logits))
    np.testing.assert_allclose(found, slope, atol=1e-6)


@pytest.mark.parametrize("tiling", TILINGS)
def test_a_surrogate_may_close_over_an_array_of_tokens(tiling):
  discount = jnp.asarray(np.random.default_rng(0).random(MASK.shape), jnp.float32)
  objective = gpo.dapo().replace(surrogate=lambda x, a: discount * jnp.exp(x) * a)
  arguments = (objective, HIDDEN_STATES, UNEMBEDDING, BIAS, near(objective))
  assert_same(step(linear_loss, **TILINGS[tiling])(*arguments), step(plain_loss)(*arguments), 1e-4)


@pytest.mark.parametrize("preset", ["grpo", "gspo"])
def test_a_loss_may_be_a_part_of_another(preset):
  objective = PRESETS[preset]
  arguments = (objective, HIDDEN_STATES, UNEMBEDDING, BIAS, near(objective))
  found, expected = (
    jax.grad(lambda *a, loss=loss: -3 * loss(*a), argnums=(0, 1, 2, 3))(*arguments)
    for loss in (linear_loss, plain_loss)
  )
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert relative_error(x, y) < 1e-4


def test_no_gradient_reaches_the_rollout():
  objective = PRESETS["grpo"]
  rollout = near(objective).replace(mask=jnp.asarray(MASK, jnp.float32))
  loss = lambda rollout: linear_loss(objective, HIDDEN_STATES, UNEMBEDDING, BIAS, rollout)
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(jax.grad(loss)(rollout)))


def test_custom_functions_take_two_passes_and_are_right():
  kinds = {
    "divergence": lambda ref_log_ratio, log_ratio, rollout: jnp.cumsum(ref_log_ratio**2, -1),
    "level": lambda log_ratio, rollout: log_ratio - jnp.mean(log_ratio, -1, keepdims=True),
    "corrections": (lambda log_probs, rollout: jnp.exp(jnp.mean(log_probs, -1, keepdims=True))
      * jnp.ones_like(log_probs),),
  }  # fmt: skip
  for slot, function in kinds.items():
    objective = gpo.grpo().replace(**{slot: function})
    assert not _linear_grad.is_token_local(objective)
    arguments = (objective, HIDDEN_STATES, UNEMBEDDING, BIAS, near(objective))
    assert_same(step(linear_loss)(*arguments), step(plain_loss)(*arguments))


RESPONSES = {"gspo", "gspo_token", "gmpo", "deepseek_v32", "r1", "vespo", "luspo", "topr"}


def dots(function, *arguments):
  return str(jax.make_jaxpr(function)(*arguments)).count("= dot_general")


@pytest.mark.parametrize("name", PRESETS)
def test_matrix_products(name):
  """One pass where a token's slope is its own; nothing for what is not differentiated."""
  objective = PRESETS[name]
  rollout = near(objective)
  tiling = {"compact": False, "tile_size": VOCABULARY}
  loss = lambda h, w: linear_loss(objective, h, w, BIAS, rollout, **tiling)
  assert _linear_grad.is_token_local(objective) == (name not in RESPONSES)
  again = name in RESPONSES
  assert dots(loss, HIDDEN_STATES, UNEMBEDDING) == 1
  assert dots(jax.grad(loss, argnums=(0, 1)), HIDDEN_STATES, UNEMBEDDING) == 3 + again
  assert dots(jax.grad(loss), HIDDEN_STATES, UNEMBEDDING) == 2 + again
  assert dots(jax.grad(loss, argnums=1), HIDDEN_STATES, UNEMBEDDING) == 2 + again


@pytest.mark.parametrize("preset", ["grpo", "gspo"])
def test_one_jitted_loss_may_be_differentiated_in_one_argument_after_another(preset):
  objective = PRESETS[preset]
  rollout = near(objective)
  loss = jax.jit(linear_loss)
  for argument in (1, 2, 3, 0):
    arguments = (objective, HIDDEN_STATES, UNEMBEDDING, BIAS, rollout)
    found, expected = (jax.grad(f, argument)(*arguments) for f in (loss, plain_loss))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
      np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * (1 + np.abs(y).max()))


def test_level_of_a_correction_decides():
  correction = functools.partial(gpo.corrections.truncate_importance, cap=2.0)
  local = gpo.grpo().replace(corrections=(correction,))
  assert _linear_grad.is_token_local(local)
  responses = functools.partial(correction, level=gpo.levels.sequence)
  assert not _linear_grad.is_token_local(gpo.grpo().replace(corrections=(responses,)))
  for objective in (local, gpo.grpo().replace(corrections=(responses,))):
    arguments = (objective, HIDDEN_STATES, UNEMBEDDING, BIAS, near(objective))
    assert_same(step(linear_loss)(*arguments), step(plain_loss)(*arguments))


@pytest.mark.parametrize("tiling", TILINGS)
def test_bfloat16(tiling):
  hidden, unembedding, bias = (x.astype(jnp.bfloat16) for x in (HIDDEN_STATES, UNEMBEDDING, BIAS))
  objective = PRESETS["grpo"]
  rollout = near(objective)
  wide = (x.astype(jnp.float32) for x in (hidden, unembedding, bias))
  value, gradients = step(plain_loss)(objective, *wide, rollout)
  found = step(linear_loss, **TILINGS[tiling])(objective, hidden, unembedding, bias, rollout)
  np.testing.assert_allclose(found[0], value, rtol=1e-4)  # the logits are not rounded
  for x, y in zip(found[1], gradients):
    assert x.dtype == jnp.bfloat16
    assert relative_error(x.astype(jnp.float32), y) < 2e-2
  mixed = step(linear_loss, **TILINGS[tiling])(
    objective, hidden, unembedding.astype(jnp.float32), bias, rollout
  )
  np.testing.assert_allclose(mixed[0], value, rtol=1e-4)
  assert mixed[1][1].dtype == jnp.float32
  assert relative_error(mixed[1][1], gradients[1]) < 1e-4


@pytest.mark.parametrize(
  ("a", "b"),
  [(jnp.bfloat16, jnp.float16), (jnp.float16, jnp.bfloat16), (jnp.bfloat16, jnp.float8_e4m3fn)],
)
def test_dtypes_neither_of_which_holds_the_other_meet_in_float32(a, b):
  """The same bits, given as float32, have the same log-probabilities and gradients."""
  hidden, unembedding = HIDDEN_STATES.astype(a), UNEMBEDDING.astype(b)

  def loss(hidden, unembedding):
    return jnp.sum(gpo.linear_token_log_probs(hidden, unembedding, TOKENS).log_probs)

  step = jax.value_and_grad(loss, argnums=(0, 1))
  value, slopes = step(hidden, unembedding)
  expected, in_float32 = step(hidden.astype(jnp.float32), unembedding.astype(jnp.float32))
  assert value == expected
  for found, wanted, dtype in zip(slopes, in_float32, (a, b), strict=True):
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, wanted.astype(dtype))


def test_tied_embeddings():
  objective = PRESETS["grpo"]
  rollout = near(objective)

  def tied(loss, embedding):
    hidden = jnp.tanh(embedding[TOKENS] * 3)
    return loss(objective, hidden, embedding, BIAS, rollout)

  x, y = (
    jax.value_and_grad(functools.partial(tied, f))(UNEMBEDDING) for f in (linear_loss, plain_loss)
  )
  assert_same(x, y)  # fmt: skip


def test_an_empty_batch_has_no_loss_and_no_gradient():
  objective = PRESETS["grpo"]
  rollout = BATCH.prepare(objective, mask=np.zeros_like(MASK))
  for tiling in TILINGS.values():
    value, gradients = step(linear_loss, **tiling)(
      objective, HIDDEN_STATES * jnp.nan, UNEMBEDDING, BIAS, rollout
    )
    assert value == 0
    assert all(not np.any(g) for g in gradients)


def test_a_nan_that_counts_is_loud():
  objective = PRESETS["grpo"]
  at = tuple(np.argwhere(MASK)[3])
  hidden = HIDDEN_STATES.at[at].set(jnp.nan)
  value, gradients = step(linear_loss)(objective, hidden, UNEMBEDDING, BIAS, near(objective))
  assert np.isnan(value)
  assert np.isnan(gradients[0][at]).all()
  assert np.isnan(gradients[1]).all()


@settings(max_examples=6, deadline=None)
@given(
  st.integers(1, 3), st.integers(1, 9), st.integers(1, 40), st.integers(1, 30), st.integers(1, 40),
  st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_and_tiling(rows, length, vocabulary, chunk_size, tile_size, compact, seed):
  hidden, unembedding, bias, tokens = draw(seed, (rows, length), vocabulary)
  mask = np.random.default_rng(seed).random((rows, length)) < 0.6
  slopes = jnp.asarray(np.random.default_rng(seed).normal(size=(rows, length)), jnp.float32)

  def linear(hidden, unembedding, bias):
    tiling = {"chunk_size": chunk_size, "tile_size": tile_size, "compact": compact}
    outputs = gpo.linear_token_log_probs(
      hidden, unembedding, tokens, mask=mask, bias=bias, **tiling
    )
    return jnp.sum(slopes * outputs.log_probs + outputs.entropy)

  def plain(hidden, unembedding, bias):
    logits = hidden @ unembedding.T + bias[None, None]
    terms = slopes * gpo.token_log_probs(logits, tokens) + gpo.token_entropy(logits)
    return jnp.sum(jnp.where(mask, terms, 0))

  x, y = (
    jax.value_and_grad(f, argnums=(0, 1, 2))(hidden, unembedding, bias) for f in (linear, plain)
  )
  np.testing.assert_allclose(x[0], y[0], rtol=1e-5, atol=1e-5)
  for found, expected in zip(x[1], y[1]):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# --- transformations
# ---------------------------------------------------------------------------------


def test_vmap_scan_and_remat():
  objective = PRESETS["grpo"]
  rollout = near(objective)
  for name in ("compact", "slices, one tile"):
    loss = lambda h, w, r, y: linear_loss(objective, h, w, BIAS, r, y, **TILINGS[name])
    grad = jax.grad(loss, argnums=(0, 1))
    d_hidden, d_unembedding = grad(HIDDEN_STATES, UNEMBEDDING, rollout, TOKENS)
    per_prompt = jax.vmap(grad, in_axes=(0, None, 0, 0))
    x, y = per_prompt(HIDDEN_STATES, UNEMBEDDING, rollout, TOKENS)
    assert relative_error(x, d_hidden) < 1e-5
    assert relative_error(y.sum(0), d_unembedding) < 1e-5

    def accumulate(total, cut):
      return total + jax.grad(loss, argnums=1)(cut[0], UNEMBEDDING, *cut[1:]), None

    cuts = (HIDDEN_STATES, rollout, TOKENS)
    summed, _ = jax.lax.scan(accumulate, jnp.zeros_like(UNEMBEDDING), cuts)
    assert relative_error(summed, d_unembedding) < 1e-5
    x, y = jax.grad(jax.checkpoint(loss), argnums=(0, 1))(
      HIDDEN_STATES, UNEMBEDDING, rollout, TOKENS
    )
    assert relative_error(x, d_hidden) < 1e-6
    assert relative_error(y, d_unembedding) < 1e-6


@pytest.mark.parametrize("preset", ["grpo", "gspo"])
def test_what_is_not_differentiable_says_so(preset):
  objective = PRESETS[preset]
  rollout = near(objective)
  loss = lambda h: linear_loss(objective, h, UNEMBEDDING, BIAS, rollout)
  with pytest.raises(NotImplementedError, match="first derivatives only"):
    jax.grad(lambda h: jnp.sum(jax.grad(loss)(h) ** 2))(HIDDEN_STATES)
  with pytest.raises(NotImplementedError, match="first derivatives only"):
    jax.jvp(jax.grad(loss), (HIDDEN_STATES,), (HIDDEN_STATES,))

  def of(setting):
    return gpo.linear_loss(
      objective, HIDDEN_STATES, UNEMBEDDING, TOKENS, rollout, **SETTINGS | setting
    )[0]

  for name, value in SETTINGS.items():
    with pytest.raises(NotImplementedError, match="temperature and softcap are not diff"):
      jax.grad(of)({name: value})


def test_a_temperature_may_change_without_a_new_trace():
  traces = []

  @jax.jit
  def run(temperature):
    traces.append(1)
    outputs = gpo.linear_token_log_probs(
      HIDDEN_STATES, UNEMBEDDING, TOKENS, temperature=temperature
    )
    return outputs.log_probs

  for temperature in (0.5, 1.0):
    expected = gpo.token_log_probs(HIDDEN_STATES @ UNEMBEDDING.T, TOKENS, temperature=temperature)
    np.testing.assert_allclose(run(temperature), expected, rtol=1e-5, atol=1e-5)
  assert len(traces) == 1


# --- devices
# -----------------------------------------------------------------------------------------

MESH_TILINGS = {
  "default": {},
  "tiles": {"compact": False, "tile_size": 10},
  "slices": {"compact": False, "chunk_size": 48},
}
VOCAB = 64  # 8 devices divide it
SHARDED = draw(vocabulary=VOCAB)


def place(mesh, tree, spec):
  def put(x):
    full = P(*spec, *(None,) * (np.ndim(x) - len(spec)))
    return jax.device_put(x, NamedSharding(mesh, full))

  return jax.tree.map(put, tree)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("vocabulary_axis", [None, "model"])
@pytest.mark.parametrize("tiling", MESH_TILINGS)
@pytest.mark.parametrize("preset", ["grpo", "gspo"])
def test_sharded_tokens_and_vocabulary(kind, vocabulary_axis, tiling, preset):
  if kind == AxisType.Explicit and vocabulary_axis and tiling == "tiles":
    pytest.skip("tiles of a sharded vocabulary need an Auto mesh")
  objective = PRESETS[preset]
  hidden, unembedding, bias, tokens = SHARDED
  rollout = near(objective)
  expected = step(plain_loss)(objective, hidden, unembedding, bias, rollout, tokens)
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
  with jax.set_mesh(mesh):
    hidden, tokens, rollout = place(mesh, (hidden, tokens, rollout), ("data",))
    unembedding, bias = place(mesh, (unembedding, bias), (vocabulary_axis,))
    run = step(linear_loss, **MESH_TILINGS[tiling])
    assert_same(run(objective, hidden, unembedding, bias, rollout, tokens), expected)


@pytest.mark.parametrize("tiling", ["compact", "slices", "default"])
@pytest.mark.parametrize("preset", ["grpo", "gspo"])
def test_shard_map(preset, tiling):
  objective = PRESETS[preset]
  hidden, unembedding, bias, tokens = SHARDED
  rollout = near(objective)
  expected = step(plain_loss)(objective, hidden, unembedding, bias, rollout, tokens)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

  def loss(objective, hidden, unembedding, bias, rollout, tokens):
    part = linear_loss(objective, hidden, unembedding, bias, rollout, tokens, **TILINGS[tiling])
    return jax.lax.psum(part, "data")

  specs = (P(), P("data"), P(), P(), P("data"), P("data"))
  mapped = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P())
  everything = (0, 1, 2, 3)
  arguments = (objective, hidden, unembedding, bias, rollout, tokens)
  found = jax.jit(jax.value_and_grad(mapped, argnums=everything))(*arguments)
  expected = jax.value_and_grad(plain_loss, argnums=everything)(*arguments)
  assert_same(found, expected)


def test_shard_map_outside_of_jit():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  hidden, unembedding, _, tokens = SHARDED

  def total(hidden, unembedding, tokens):
    outputs = gpo.linear_token_log_probs(hidden, unembedding, tokens)
    return jax.lax.psum(jnp.sum(outputs.log_probs), "data")

  specs = (P("data"), P(), P("data"))
  mapped = jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=P())
  expected = jnp.sum(gpo.token_log_probs(hidden @ unembedding.T, tokens))
  np.testing.assert_allclose(mapped(hidden, unembedding, tokens), expected, rtol=1e-5)


# --- memory
# ------------------------------------------------------------------------------------------


def temporaries(function, *shapes):
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("preset", ["grpo", "gspo"])
def test_memory_is_a_chunk_of_logits_whatever_the_batch(preset, compact):
  rows, length, vocabulary, width, chunk_size = 8, 512, 8192, 64, 128
  objective = PRESETS[preset]
  shape = (1, rows, length)
  rollout = objective.prepare(
    np.eye(1, rows), np.ones(shape), np.zeros(shape), ref_log_probs=np.zeros(shape)
  )

  def loss(hidden, unembedding):
    tokens = jnp.zeros(shape, int)
    tiling = {"chunk_size": chunk_size, "compact": compact, "tile_size": 1024}
    return gpo.linear_loss(objective, hidden, unembedding, tokens, rollout, **tiling)[0]

  def plain(hidden, unembedding):
    return objective(gpo.token_log_probs(hidden @ unembedding.T, jnp.zeros(shape, int)), rollout)[0]

  shapes = ((*shape, width), (vocabulary, width))
  promised = 4 * chunk_size * vocabulary + 16e6
  assert temporaries(jax.value_and_grad(loss, argnums=(0, 1)), *shapes) < promised
  assert temporaries(loss, *shapes) < 16e6  # no gradient: one tile
  every_logit = 4 * rows * length * vocabulary
  assert temporaries(jax.value_and_grad(plain, argnums=(0, 1)), *shapes) > every_logit


def test_from_logits_nothing_of_their_size_is_made():
  shape = (4, 64, 4096)
  loss = lambda logits: jnp.sum(gpo.token_log_probs(logits, jnp.zeros(shape[:-1], int)))
  assert temporaries(jax.value_and_grad(loss), shape) < 4 * np.prod(shape) / 20


# --- the exact divergence
# ----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 20, 256])
def test_exact_kl_from_hidden_states(chunk_size):
  ref_hidden, ref_unembedding, ref_bias, _ = draw(7)

  def plain(hidden, unembedding, bias):
    logits = hidden @ unembedding.T + bias[None, None, None]
    ref_logits = ref_hidden @ ref_unembedding.T + ref_bias[None, None, None]
    return gpo.exact_kl(logits, ref_logits, **SETTINGS)

  def linear(hidden, unembedding, bias, garbage=0.0):
    return gpo.linear_exact_kl(
      jnp.where(MASK[..., None], hidden, garbage), unembedding,
      jnp.where(MASK[..., None], ref_hidden, garbage), ref_unembedding,
      mask=MASK, bias=bias, ref_bias=ref_bias, chunk_size=chunk_size, **SETTINGS,
    )  # fmt: skip

  slopes = np.random.default_rng(8).normal(size=MASK.shape).astype(np.float32)
  arguments = (HIDDEN_STATES, UNEMBEDDING, BIAS)
  total = lambda of: lambda *x: jnp.sum(jnp.where(MASK, slopes * of(*x), 0))
  expected = jax.value_and_grad(total(plain), argnums=(0, 1, 2))(*arguments)
  found = jax.value_and_grad(total(linear), argnums=(0, 1, 2))(*arguments)
  assert_same(found, expected)
  dirty = functools.partial(linear, garbage=jnp.nan)
  dirty = jax.value_and_grad(total(dirty), argnums=(0, 1, 2))(*arguments)
  jax.tree.map(np.testing.assert_array_equal, dirty, found)


def test_exact_kl_is_0_at_the_reference_and_has_no_gradient_there():
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7)), jnp.float32)
  loss = lambda x, y: jnp.sum(gpo.exact_kl(x, y))
  value, gradient = jax.value_and_grad(loss)(logits, logits)
  assert value == 0
  np.testing.assert_allclose(gradient, 0, atol=1e-7)
  assert not np.any(jax.grad(loss, argnums=1)(logits + 1.0 * jnp.arange(7.0)[None], logits))


# --- wrong input
# -------------------------------------------------------------------------------------


def call(function=gpo.linear_token_log_probs, **changes):
  arguments = {"hidden": HIDDEN_STATES, "unembedding": UNEMBEDDING, "tokens": TOKENS} | changes
  return function(**arguments)


WRONG = {
  "logits without an axis": (lambda: gpo.token_log_probs(1.0, 0), "logits must be"),
  "tokens of another shape": (lambda: gpo.token_log_probs(np.zeros((4, 5)), [1]), "tokens must be"),
  "tokens of floats": (lambda: gpo.token_log_probs(np.zeros((1, 5)), [1.0]), "tokens must be int"),
  "where of another shape": (
    lambda: gpo.token_log_probs(np.zeros((1, 5)), [1], where=np.ones(4)),
    r"where must broadcast .* got where \[4\], logits \[1, 5\]",
  ),
  "a mask of tokens as where": (
    lambda: gpo.token_log_probs(np.zeros((2, 5)), [1, 1], where=[True, False]),
    r"mask\[..., None\]",
  ),
  "a temperature per token": (
    lambda: gpo.token_log_probs(np.zeros((1, 5)), [1], temperature=[1.0]),
    "temperature must be a scalar",
  ),
  "two shapes of logits": (
    lambda: gpo.exact_kl(np.zeros((1, 5)), np.zeros((1, 6))),
    "ref_logits must have the shape of logits",
  ),
  "a kernel [H, V]": (lambda: call(unembedding=UNEMBEDDING.T), r"transpose a kernel \[H, V\]"),
  "hidden of one axis": (lambda: call(hidden=jnp.ones(16), tokens=1), "hidden must be"),
  "tokens shifted by one": (lambda: call(tokens=TOKENS[..., 1:]), "shift"),
  "chunk_size 0": (lambda: call(chunk_size=0), "chunk_size must be an integer of at least 1"),
  "tile_size 0.5": (lambda: call(tile_size=0.5), "tile_size must be an integer"),
  "exact KL of two vocabularies": (
    lambda: gpo.linear_exact_kl(HIDDEN_STATES, UNEMBEDDING, HIDDEN_STATES, UNEMBEDDING[1:]),
    "make logits of one shape",
  ),
  "a rollout of another shape": (
    lambda: gpo.linear_loss(
      gpo.dapo(), HIDDEN_STATES, UNEMBEDDING, TOKENS,
      gpo.dapo().prepare([[1.0, 0.0]], np.ones((1, 2, 3))),
    ),
    "mask must have the shape of tokens",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name):
  function, message = WRONG[name]
  with pytest.raises(ValueError, match=message):
    function()


def test_compact_chunks_are_refused_on_an_explicit_mesh():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(mesh):
    hidden, tokens = place(mesh, (HIDDEN_STATES, TOKENS), ("data",))
    with pytest.raises(ValueError, match="compact must be False"):
      call(hidden=hidden, tokens=tokens, compact=True)
