"""A few ids per position, and the sampler's support: values and gradients of the full logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from tests.support import linear
from tests.support.linear import BIAS, HIDDEN, MASK, SETTINGS, TOKENS, UNEMBEDDING, VOCABULARY

K, S = 5, 9
STATE = (HIDDEN, UNEMBEDDING, BIAS)
RNG = np.random.default_rng(1)
IDS = RNG.integers(0, VOCABULARY, (*MASK.shape, K))
IDS[..., 3] = IDS[..., 1]  # the same twice
SUPPORT = np.argsort(RNG.random((*MASK.shape, VOCABULARY)), -1)[..., :S]
SUPPORT[..., 4] = SUPPORT[..., 6]  # the same twice
SUPPORT[..., 1] = np.where(SUPPORT[..., 1] % 2, -1, SUPPORT[..., 1])
KEPT = np.any(SUPPORT[..., None] == np.arange(VOCABULARY), -2)
INSIDE = SUPPORT[..., [0, 4]]
SLOPES = RNG.normal(size=(*MASK.shape, K)).astype(np.float32)


def total(outputs):
  own = outputs.log_probs
  slopes = SLOPES.astype(own.dtype)
  of_own = slopes[..., 0] if own.ndim == MASK.ndim else slopes[..., : own.shape[-1]]
  return jnp.sum(of_own * own) + jnp.sum(slopes[..., 1] * outputs.entropy), outputs


def step(function):
  loss = lambda *arguments: total(function(*arguments))
  return linear.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def from_hidden(*state_and_tokens, **how):
  *state, tokens = state_and_tokens
  head = gpo.Head(*state[1:], **SETTINGS)
  return gpo.linear_token_log_probs(state[0], head, tokens, mask=MASK, **how)


def from_logits(*state_and_tokens, **how):
  *state, tokens = state_and_tokens
  logits = linear.logits_of(*state)
  settings = SETTINGS | how
  log_probs = gpo.token_log_probs(logits, tokens, **settings)
  mask = MASK if tokens.ndim == MASK.ndim else MASK[..., None]
  entropy = jnp.where(MASK, gpo.token_entropy(logits, **settings), 0)
  return gpo.TokenLogProbs(jnp.where(mask, log_probs, 0), entropy)


ASKED = {
  "several": (IDS, {"tiling": gpo.Tiling(50, 20)}, {}),
  "one_of_several": (IDS[..., :1], {"tiling": gpo.Tiling(50, 20)}, {}),
  "of_the_support": (INSIDE[..., 0], {"support": SUPPORT}, {"support": KEPT}),
  "several_of_the_support": (INSIDE, {"support": SUPPORT}, {"support": KEPT}),
}


@pytest.mark.quick("several", "of_the_support")
@pytest.mark.parametrize("name", ASKED)
def test_values_and_gradients_are_those_of_the_full_logits(name):
  tokens, how, full = ASKED[name]
  run = step(functools.partial(from_hidden, **how))
  found = run(*STATE, tokens)
  linear.assert_same(found, step(functools.partial(from_logits, **full))(*STATE, tokens), 2e-5)
  dirty = jnp.where(MASK[..., None], HIDDEN, jnp.nan), *STATE[1:]
  tokens = np.where(MASK if tokens.ndim == MASK.ndim else MASK[..., None], tokens, 10**6)
  again = run(*dirty, tokens)
  jax.tree.map(np.testing.assert_array_equal, again, found)


@pytest.mark.usefixtures("x64")
def test_in_float64_and_of_tied_logits():
  """Where logits are equal, as of a head of zeros, each id still has its own gradient."""
  state = [jnp.asarray(x, jnp.float64) for x in (HIDDEN, 0 * UNEMBEDDING, 0 * BIAS)]
  found, wanted = (step(f)(*state, IDS) for f in (from_hidden, from_logits))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-11), found, wanted)
  assert found[0][0].dtype == jnp.float64


def test_an_id_outside_is_nan_and_a_token_outside_of_the_support_impossible():
  hidden, head = HIDDEN[0, 0, :2], UNEMBEDDING
  ids = jnp.array([[0, -1, VOCABULARY, 3], [-100, 10**6, -1, VOCABULARY]])
  found = gpo.linear_token_log_probs(hidden, head, ids).log_probs
  np.testing.assert_array_equal(jnp.isnan(found), [[False, True, True, False], [True] * 4])
  full = gpo.token_log_probs(hidden @ head.T, ids)
  np.testing.assert_allclose(found[0, ::3], full[0, ::3], rtol=1e-5)
  support = jnp.array([[3, 5, -1], [-1, -1, -1]])
  found = gpo.linear_token_log_probs(hidden, head, ids, support=support).log_probs
  assert found[0, 0] == -jnp.inf
  assert found[0, 3] > -jnp.inf
  np.testing.assert_array_equal(jnp.isnan(found), [[False, True, True, False], [True] * 4])
  nothing = gpo.linear_token_log_probs(hidden, head, jnp.array([3, 3]), support=support)
  assert nothing.log_probs[1] == -jnp.inf
  unknown = jnp.array([[3, VOCABULARY, -1], [3, 5, -1]])
  found = gpo.linear_token_log_probs(hidden, head, jnp.array([3, 3]), support=unknown)
  np.testing.assert_array_equal(jnp.isnan(found.log_probs), [True, False])


def test_the_support_of_a_masked_position_may_hold_anything():
  hidden, tokens, mask = HIDDEN[0, 0, :2], jnp.array([3, 3]), jnp.array([1, 0])
  support = jnp.array([[3, 5, -1], [3, VOCABULARY, -1]])

  def loss(head, support):
    return jnp.sum(gpo.linear_token_log_probs(hidden, head, tokens, mask=mask, support=support)[0])

  found, wanted = (jax.grad(loss)(UNEMBEDDING, x) for x in (support, support[:1].repeat(2, 0)))
  np.testing.assert_array_equal(found, wanted)
  assert np.any(found)


def test_a_token_that_the_bias_bans_is_impossible():
  bias = BIAS.at[3].set(-jnp.inf)
  ids = jnp.array([[3, 7], [3, 3]])
  hidden = HIDDEN[0, 0, :2]
  for support in (None, jnp.array([[3, 7, 9]] * 2)):
    found = gpo.linear_token_log_probs(hidden, gpo.Head(UNEMBEDDING, bias), ids, support=support)
    np.testing.assert_array_equal(found.log_probs == -jnp.inf, [[True, False], [True, True]])
    assert jnp.isfinite(found.entropy).all()


def test_with_the_sampler_s_support_an_unchanged_policy_has_ratios_of_1():
  logits = np.asarray(linear.logits_of(*STATE), np.float64) / 0.7
  support = np.argsort(-logits, -1)[..., :S]  # top-k
  kept = np.take_along_axis(logits, support, -1)
  sampler = kept - np.log(np.sum(np.exp(kept), -1, keepdims=True))
  tokens = support[..., 2]
  head = gpo.Head(UNEMBEDDING, BIAS, temperature=0.7)

  def ratios(**how):
    found = gpo.linear_token_log_probs(HIDDEN, head, tokens, **how)
    return np.exp(found.log_probs - sampler[..., 2])

  np.testing.assert_allclose(ratios(support=support), 1, rtol=1e-5)
  assert np.median(ratios()) < 0.97


def test_several_ids_take_one_pass_over_the_vocabulary_and_a_support_none():
  tokens, vocabulary, width, k = 128, 2048, 8, 64
  shapes = ((1, tokens, width), (vocabulary, width))
  ids = jnp.zeros((1, tokens, k), int)

  def of(**how):
    return lambda hidden, w: jnp.sum(gpo.linear_token_log_probs(hidden, w, **how).log_probs)

  like = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  count = lambda **how: linear.products(of(**how), *like)
  assert count(tokens=ids) == count(tokens=ids[..., 0]) > 0
  assert count(tokens=ids[..., 0], support=ids) == 0
  grad = jax.value_and_grad(of(tokens=ids), argnums=(0, 1))
  assert linear.temporaries(grad, *shapes) < 4 * tokens * k * vocabulary / 8


@pytest.mark.parametrize("name", ["several", "of_the_support"])
def test_second_derivatives_say_so(name):
  tokens, how, _ = ASKED[name]
  loss = lambda h: total(from_hidden(h, *STATE[1:], tokens, **how))[0]
  with pytest.raises(NotImplementedError, match="first reverse-mode derivatives only"):
    jax.eval_shape(jax.grad(lambda h: jnp.sum(jax.grad(loss)(h) ** 2)), HIDDEN)


WRONG = {
  "tokens": ({"tokens": TOKENS[:, :1]}, r"tokens must have one id per position, .* or K; got"),
  "no_ids": ({"tokens": IDS[..., :0]}, r"tokens must .*; got \[8, 4, 6, 0\]"),
  "mask": ({"tokens": IDS, "mask": MASK[:1]}, "mask must have the shape of tokens"),
  "support": ({"tokens": TOKENS, "support": SUPPORT[:1]}, "support must have one id per position"),
  "bools": ({"tokens": TOKENS, "support": KEPT}, "support must be integers; got dtype bool"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named(name):
  arguments, message = WRONG[name]
  with pytest.raises(ValueError, match=message):
    gpo.linear_token_log_probs(HIDDEN, UNEMBEDDING, **arguments)
