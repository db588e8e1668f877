"""The functions that replace textbook forms, exact where those lose every digit, and sums."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax import _segments
from gpo_jax._numerics import bound, exp_excess, sigmoid, with_slope

MAGNITUDES = np.concatenate([np.logspace(-9, np.log10(20), 20_000), np.linspace(0.01, 20, 20_000)])
POINTS = np.concatenate([MAGNITUDES, -MAGNITUDES]).astype(np.float32)


def exact(x):
  """Gives e^x − x − 1 in extended precision: a series below 0.1, the formula above."""
  x = x.astype(np.longdouble)
  series = sum(x**n / np.longdouble(math.factorial(n)) for n in range(2, 20))
  return np.where(np.abs(x) < 0.1, series, np.expm1(x) - x)


def rollout_of(shape, advantage=1.0, **fields):
  ones = {"mask": jnp.ones(shape, bool), "weights": jnp.ones(shape)}
  return gpo.Rollout(advantages=jnp.full((1,), advantage), **ones | fields)


def worst(value, expected):
  return float(np.max(np.abs(np.asarray(value, np.longdouble) / expected - 1)))


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_exp_excess_and_its_slope_to_rounding(transform):
  assert worst(transform(exp_excess)(POINTS), exact(POINTS)) < 5e-7
  slope = transform(jax.vmap(jax.grad(exp_excess)))(POINTS)
  assert worst(slope, np.expm1(POINTS.astype(np.longdouble))) < 5e-7


@pytest.mark.quick("unbiased--1", "k3--1", "chi2_minus_kl-1")
@pytest.mark.parametrize(
  ("name", "sign"),
  [("k3", -1), ("straight_through", -1), ("unbiased", -1), ("chi2_minus_kl", 1), ("forward_kl", 1)],
)
def test_divergences_are_exact_to_rounding(name, sign):
  log_ratio = POINTS if name == "forward_kl" else 0 * POINTS  # its weight is π_ref/π_old
  found = jax.jit(getattr(gpo.divergences, name))(POINTS, log_ratio, rollout_of(POINTS.shape))
  assert worst(found, exact(sign * POINTS)) < 5e-7


def test_the_textbook_forms_fail_where_ours_holds():
  small = POINTS[np.abs(POINTS) < 1e-3]
  assert worst(np.exp(small) - small - 1, exact(small)) > 1
  assert worst(np.expm1(small) - small, exact(small)) > 0.1
  assert np.mean(np.exp(small) - small - np.float32(1) < 0) > 0.05


def test_exp_excess_in_float64_and_its_derivatives(x64):
  points = POINTS.astype(np.float64)
  assert worst(exp_excess(points), exact(points)) < 1e-14
  for order, expected in ((2, np.exp), (3, np.exp)):
    derivative = exp_excess
    for _ in range(order):
      derivative = jax.grad(derivative)
    np.testing.assert_allclose(jax.vmap(derivative)(points), expected(points), rtol=1e-13)


def test_exp_excess_at_the_ends():
  assert exp_excess(jnp.float32(0)) == jax.grad(exp_excess)(0.0) == 0
  for x in (jnp.inf, -jnp.inf, jnp.nan):
    assert not jnp.isfinite(exp_excess(jnp.float32(x)))


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_bound_keeps_slope_and_hides_nothing(transform):
  x = jnp.array([-1e10, -100.0, -20.0, 0.3, 20.0, 100.0, 1e30])
  np.testing.assert_array_equal(transform(bound)(x), np.clip(x, -20, 20))
  np.testing.assert_array_equal(transform(jax.vmap(jax.grad(bound)))(x), np.ones(7))
  assert jnp.isnan(transform(bound)(jnp.array([jnp.inf, -jnp.inf, jnp.nan]))).all()


def test_with_slope_gives_value_and_slope():
  value, slope = jax.value_and_grad(lambda x: with_slope(x**3, 5.0 * x, x))(2.0)
  assert (value, slope) == (8, 10)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_sigmoid_keeps_its_slope_where_it_saturates(transform):
  x = np.linspace(-80, 80, 4001, dtype=np.float32)
  wide = x.astype(np.longdouble)
  slope = 1 / (2 + np.exp(wide) + np.exp(-wide))
  np.testing.assert_array_equal(transform(sigmoid)(x), transform(jax.nn.sigmoid)(x))
  assert worst(transform(jax.vmap(jax.grad(sigmoid)))(x), slope) < 1e-6
  second = transform(jax.vmap(jax.grad(jax.grad(sigmoid))))(x)
  expected = slope * -np.tanh(wide / 2)
  np.testing.assert_allclose(second, expected.astype(np.float64), rtol=1e-5)
  assert jax.grad(jax.nn.sigmoid)(18.0) == 0


@pytest.mark.parametrize("ratio", [0.01, 1.0, 5.0, 18.0, 40.0, 80.0])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_sapo_fades_and_never_drops_a_token(ratio, advantage):
  temperature = 1.0 if advantage > 0 else 1.05
  log_ratio = np.log(np.float32(ratio))
  slope = jax.grad(gpo.surrogates.sapo)(log_ratio, advantage)
  ratio = math.exp(float(log_ratio))
  x = temperature * (ratio - 1)
  expected = 4 * advantage * ratio / (2 + math.exp(x) + math.exp(-x))
  np.testing.assert_allclose(slope, expected, rtol=3e-5)
  tempered = jax.grad(lambda t: gpo.surrogates.sapo(0.5, advantage, temperature_pos=t))(1.0)
  assert (tempered != 0) == (advantage > 0)


def unbiased_slope(delta, drift):
  """The coefficient of ∇log π in the unbiased KL, by autodiff through the objective."""
  objective = gpo.deepseek_v32(beta=1.0).replace(corrections=())
  others = {"old_log_probs": -drift, "ref_log_probs": -delta}
  rollout = rollout_of((1, 1), 0.0, **{name: jnp.full((1, 1), x) for name, x in others.items()})
  return jax.grad(lambda x: objective(x, rollout)[0])(jnp.zeros((1, 1)))[0, 0]


@pytest.mark.parametrize("delta", [-20.0, -3.0, -1e-1, -1e-4, 1e-6, 1e-2, 1.0, 20.0])
def test_unbiased_has_the_slope_rho_delta_at_every_distance(delta):
  for drift in (0.0, 1.5, -2.0):
    expected = math.exp(drift) * np.float32(delta)
    np.testing.assert_allclose(unbiased_slope(delta, drift), expected, rtol=5e-7)


def test_autodiff_of_the_product_has_lost_it():
  naive = jax.grad(lambda x: jnp.exp(x) * (jnp.exp(-(x - 20)) + (x - 20) - 1))
  assert abs(naive(jnp.float32(0.0)) / -20 - 1) > 0.1
  far = jax.grad(lambda x: jnp.exp(x) * (jnp.exp(-(x - 30)) + (x - 30) - 1))
  assert far(jnp.float32(0.0)) == 0


@pytest.mark.parametrize("delta", [-1000.0, -30.0, 30.0, 1000.0])
def test_no_distance_switches_the_penalty_off(delta):
  np.testing.assert_allclose(unbiased_slope(delta, 0.0), np.sign(delta) * 20.0, rtol=5e-7)
  k3 = jax.grad(lambda x: gpo.divergences.k3(bound(x), None, None))(jnp.float32(-1000.0))
  np.testing.assert_allclose(k3, -math.expm1(20.0), rtol=1e-6)


def test_an_absolute_penalty_rests_where_the_policies_agree():
  slope = jax.grad(lambda x: gpo.divergences.absolute(x, None, None))
  assert [slope(x) for x in (-0.5, 0.0, 0.5)] == [-1, 0, 1]
  assert jax.grad(jnp.abs)(0.0) == 1


def test_a_clipped_geometric_mean_takes_nothing_from_other_slopes():

  def loss(x, limited):
    level = gpo.levels.clipped_sequence(x, rollout_of(2)) if limited else 0.0
    return 1e8 * jnp.sum(level) + jnp.sum(1.25 * x)

  np.testing.assert_array_equal(jax.grad(loss)(jnp.ones(2), True), [1.25, 1.25])


@pytest.mark.quick("packed")
@pytest.mark.parametrize("segment_ids", [None, np.array([1, 1, 1, 2])], ids=["row", "packed"])
def test_a_large_penalty_leaves_small_later_ones_their_slope(segment_ids):
  rollout = rollout_of(4, segment_ids=segment_ids)
  penalties = jnp.array([1e-8, 2.0, 1e-8, 1e-8])

  def loss(log_ratio):
    return jnp.sum(gpo.divergences.sequence_exact(penalties, log_ratio, rollout))

  later = [2.0, 1e-8, 0, 0] if segment_ids is not None else [2.0, 2e-8, 1e-8, 0]
  np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(4)), later, rtol=1e-6)


@pytest.mark.slow
def test_sums_of_earlier_tokens_start_anew_in_each_segment():
  rng = np.random.default_rng(0)
  ids = np.cumsum(rng.random((5, 23)) < 0.3, axis=-1)
  x = rng.integers(1, 9, ids.shape).astype(np.float32)
  expected = [
    [sum(row[j] for j in range(t) if i[j] == i[t]) for t in range(23)] for row, i in zip(x, ids)
  ]
  np.testing.assert_array_equal(_segments.earlier(jnp.asarray(x), jnp.asarray(ids)), expected)


def test_a_penalty_at_a_masked_token_is_not_seen():
  rollout = rollout_of(3, mask=jnp.array([True, False, True]))

  def loss(log_ratio, kl):
    return jnp.sum(gpo.divergences.sequence_exact(kl, log_ratio, rollout))

  value, gradient = jax.value_and_grad(loss)(jnp.zeros(3), jnp.array([1.0, jnp.nan, 2.0]))
  assert value == 3
  np.testing.assert_array_equal(gradient, [2, 2, 0])  # a clean log-ratio there is a constant 0
  clean = jax.grad(loss, 1)(jnp.zeros(3), jnp.ones(3))
  np.testing.assert_array_equal(clean, [1, 0, 1])


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [-9.0, 0.0, 9.0])
def test_a_nan_clip_is_never_hidden(advantage, log_ratio):
  rollout = rollout_of(2, advantage)
  a = jnp.asarray(advantage)
  level = jax.jit(  # where its value is known it raises
    lambda nan: gpo.levels.clipped_sequence(jnp.full(2, log_ratio), rollout, low=nan)
  )(jnp.nan)
  surrogate = jax.jit(lambda x: gpo.surrogates.clip(log_ratio, a, epsilon_low=x))(jnp.nan)
  cap = jax.jit(lambda x: gpo.surrogates.clip(log_ratio, a, max_ratio=x))(jnp.nan)
  assert jnp.isnan(level).all()
  assert jnp.isnan(surrogate)
  assert jnp.isnan(cap) or (advantage > 0 and log_ratio > 0)  # clipped before the cap
