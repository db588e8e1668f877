"""`generalized`: GAE over the tokens that count."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gpo_jax as gpo
from gpo_jax import advantages

RNG = np.random.default_rng(0)
MASK = np.array([[1, 1, 0, 0, 1, 1, 0], [0, 1, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0]], bool)
REWARDS, VALUES = RNG.normal(size=(2, *MASK.shape))
compiled = jax.jit(advantages.generalized)


def by_definition(rewards, values, discount, decay):
  """A_t = Σ_l (γλ)^l δ_t+l of one response without holes: the definition, not its recursion."""
  deltas = [
    reward + discount * (values[t + 1] if t + 1 < len(values) else 0.0) - values[t]
    for t, reward in enumerate(rewards)
  ]
  return [
    sum((discount * decay) ** (s - t) * deltas[s] for s in range(t, len(deltas)))
    for t in range(len(deltas))
  ]


def expect(mask, discount, decay, ids=None):
  """Takes each response's tokens out of its row, and puts their advantages back."""
  ids = np.ones(mask.shape, int) if ids is None else ids
  expected = np.zeros(mask.shape)
  for row in range(len(mask)):
    for response in set(ids[row]):
      at = np.flatnonzero(mask[row] & (ids[row] == response))
      given = (REWARDS[row, at], VALUES[row, at])
      expected[row, at] = by_definition(*given, discount, decay)
  return expected


@pytest.mark.parametrize(("discount", "decay"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.5, 0.0)])
def test_generalized_by_its_definition(discount, decay, x64):
  found = compiled(REWARDS, VALUES, MASK, discount=discount, decay=decay)
  expected = expect(MASK, discount, decay)
  np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
  # The control: tool tokens as tokens of reward and value 0, with a factor γλ for each of them.
  filled = np.where(MASK, REWARDS, 0), np.where(MASK, VALUES, 0)
  bridged = compiled(*filled, np.ones_like(MASK), discount=discount, decay=decay)
  gap = np.abs(np.where(MASK, bridged, 0) - expected).max()
  assert gap > 0.01 if discount * decay < 1 else gap < 1e-12


def test_the_returns_of_a_worked_example():
  rewards, mask = jnp.array([0.0, 0.0, 0.0, 0.0, 2.0]), jnp.array([1, 1, 0, 0, 1])
  returns = compiled(rewards, 0 * rewards, mask, discount=0.5, decay=1.0)
  np.testing.assert_array_equal(returns, [0.5, 1, 0, 0, 2])
  # The control: if tool tokens cost their factor, the first would have 2/2⁴.
  assert compiled(rewards, 0 * rewards, jnp.ones(5), discount=0.5, decay=1.0)[0] == 0.125


def test_packed_rows_have_an_end_per_response(x64):
  ids = np.array([[1, 1, 9, 9, 1, 2, 2], [0, 1, 2, 2, 2, 2, 3], [0, 0, 0, 0, 0, 0, 0]])
  found = compiled(REWARDS, VALUES, MASK, ids, discount=0.9, decay=0.8)
  # A masked token belongs to the response before it, whatever its id.
  meant = np.array([[1, 1, 1, 1, 1, 2, 2], [0, 1, 2, 2, 2, 2, 3], [0, 0, 0, 0, 0, 0, 0]])
  expected = expect(MASK, 0.9, 0.8, meant)
  np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
  assert np.abs(expect(MASK, 0.9, 0.8) - expected).max() > 0.1  # the control: as one response


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_masked_tokens_are_invisible_and_a_nan_stays_in_its_response(garbage):
  clean = compiled(REWARDS, VALUES, MASK)
  dirty = [np.where(MASK, x, garbage) for x in (REWARDS, VALUES)]
  np.testing.assert_array_equal(compiled(*dirty, MASK), clean)
  ids = np.array([[1, 1, 1, 1, 2, 2, 2]] * 3)
  values = VALUES.copy()
  values[0, 5] = np.nan
  found = compiled(REWARDS, values, MASK, ids)
  np.testing.assert_array_equal(np.isnan(found[0]), [0, 0, 0, 0, 1, 1, 0])
  assert np.isfinite(found[1:]).all()


def test_no_gradient_flows():
  total = lambda r, v: jnp.sum(advantages.generalized(r, v, MASK) ** 2)
  for gradient in jax.grad(total, argnums=(0, 1))(REWARDS, VALUES):
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_rows_on_eight_devices(axis_type):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
  wide = [np.tile(x, (8, 1, 1)).astype(np.float32) for x in (REWARDS, VALUES)]
  mask = np.tile(MASK, (8, 1, 1))
  expected = compiled(*wide, mask)
  with jax.set_mesh(mesh):
    placed = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (*wide, mask)]
    np.testing.assert_allclose(compiled(*placed), expected, rtol=1e-6)


def test_bad_input():
  with pytest.raises(ValueError, match=r"values must have the shape of mask; .*mask \[3, 7\]"):
    advantages.generalized(REWARDS, VALUES[:, :3], MASK)
  for key, bad in (("discount", 1.5), ("decay", -0.1), ("decay", np.nan)):
    with pytest.raises(ValueError, match=rf"{key} must be in \[0, 1\]; got"):
      advantages.generalized(REWARDS, VALUES, MASK, **{key: bad})


def test_with_values_of_zero_and_no_discount_it_is_the_rewards_to_go(x64):
  """And so `reward-to-go minus a baseline`: decay 1 and any values are returns minus values."""
  to_go = compiled(REWARDS, 0 * VALUES, MASK, discount=1.0, decay=1.0)
  expected = np.cumsum(np.where(MASK, REWARDS, 0)[:, ::-1], -1)[:, ::-1] * MASK
  np.testing.assert_allclose(to_go, expected, rtol=1e-12, atol=1e-14)
  minus = compiled(REWARDS, VALUES, MASK, discount=1.0, decay=1.0)
  np.testing.assert_allclose(minus, expected - VALUES * MASK, rtol=1e-12, atol=1e-14)


# --- with a critic, end to end -------------------------------------------------------------------


def clipped_value_loss(values, old_values, returns, rollout, limit=0.2):
  """½ max((V − R)², (V_old + clip(V − V_old) − R)²), as PPO's implementations have it."""
  near = old_values + jnp.clip(values - old_values, -limit, limit)
  worse = jnp.maximum((values - returns) ** 2, (near - returns) ** 2) / 2
  return jnp.sum(rollout.weights * worse, where=rollout.mask)


def test_ppo_with_a_critic_learns_a_task_of_two_steps():
  """The second token matters only if the first was right: the critic tells the two apart."""
  objective, tokens = gpo.ppo(), 4
  params = {"policy": jnp.zeros((3, tokens)), "critic": jnp.zeros(3)}  # states: start, right, wrong
  mask = jnp.ones((64, 1, 2), bool)

  def after(first):
    return jnp.where(first == 1, 1, 2)

  def states(actions):
    return jnp.stack([jnp.zeros_like(actions[..., 0]), after(actions[..., 0])], axis=-1)

  @jax.jit
  def sample(params, key):
    first_key, second_key = jax.random.split(key)
    first = jax.random.categorical(first_key, params["policy"][0], shape=(64, 1))
    second = jax.random.categorical(second_key, params["policy"][after(first)])
    actions = jnp.stack([first, second], axis=-1)
    right = ((first == 1) & (second == 2)).astype(jnp.float32)
    rewards = jnp.zeros(mask.shape).at[..., 1].set(right)
    values = params["critic"][states(actions)]
    advantage = advantages.generalized(rewards, values, mask, discount=1.0, decay=0.95)
    log_probs = log_probs_of(params, actions)
    return actions, rewards, values, advantage, log_probs

  def log_probs_of(params, actions):
    logits = jax.nn.log_softmax(params["policy"])[states(actions)]
    return jnp.take_along_axis(logits, actions[..., None], axis=-1)[..., 0]

  @jax.jit
  def update(params, actions, values, advantage, log_probs):
    rollout = objective.prepare(advantages=advantage, mask=mask, old_log_probs=log_probs)

    def loss(params):
      policy, _ = objective(log_probs_of(params, actions), rollout)
      returns = advantage + values
      critic = clipped_value_loss(params["critic"][states(actions)], values, returns, rollout)
      return policy + critic

    gradient = jax.grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 2.0 * g, params, gradient)

  earned = []
  for step in range(60):
    actions, rewards, values, advantage, log_probs = sample(params, jax.random.key(step))
    earned.append(float(rewards.sum() / 64))
    for _ in range(4):
      params = update(params, actions, values, advantage, log_probs)
  assert np.mean(earned[:3]) < 0.2
  assert np.mean(earned[-3:]) > 0.95
  # The critic knows the states: after a wrong start nothing is left to win.
  assert params["critic"][1] > 0.8
  assert abs(params["critic"][2]) < 0.2


def test_ppo_needs_advantages():
  with pytest.raises(ValueError, match=r"no advantage function for rewards: pass advantages="):
    gpo.ppo().prepare(jnp.ones((2, 3)), jnp.ones((2, 3, 4)))
  with pytest.raises(ValueError, match="rewards or advantages, one of the two; got neither"):
    gpo.ppo().prepare(mask=jnp.ones((2, 3, 4)))


def test_the_clipped_value_loss(x64):
  """Its gradient is 0 where the value has moved beyond the limit in the returns' direction."""
  rollout = gpo.ppo().prepare(advantages=jnp.zeros((1, 1, 4)), mask=jnp.ones((1, 1, 4)))
  old, returns = jnp.zeros((1, 1, 4)), jnp.array([[[1.0, 1.0, -1.0, 1.0]]])
  values = jnp.array([[[0.1, 0.5, 0.5, -0.5]]])
  slope = jax.grad(partial(clipped_value_loss, rollout=rollout))(values, old, returns)
  np.testing.assert_allclose(4 * slope, [[[-0.9, 0, 1.5, -1.5]]], atol=1e-15)
