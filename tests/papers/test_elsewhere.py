"""TRL and Liger-Kernel under the same names: equal, or different for a stated reason."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax import advantages, corrections, divergences, levels, surrogates
from tests.support.batches import batch


def data():
  return batch(dtype=np.float64)


def numeric(function, x, where, step=1e-6):
  """Differentiates by central differences at the places that count."""
  gradient = np.zeros(x.shape)
  for place in np.argwhere(where):
    moved = np.zeros(x.shape)
    moved[tuple(place)] = step
    gradient[tuple(place)] = (function(x + moved) - function(x - moved)) / (2 * step)
  return gradient


@pytest.mark.slow
def test_bias_corrected_kl_at_the_responses_ratio(x64):
  """KL_t · s, s the geometric mean of the response's ratios, differentiable."""
  given = data()
  corrected = lambda d, r, ro: divergences.k3(d, r, ro) * jnp.exp(levels.sequence(r, ro))
  ours = gpo.gspo().replace(divergence=corrected, beta=0.5)
  rollout, mask = given.prepare(ours), given.mask
  weights, advantages = np.asarray(rollout.weights), np.asarray(rollout.advantages)
  count = np.maximum(mask.sum(-1, keepdims=True), 1)

  def theirs(log_probs):
    d = np.where(mask, log_probs - given.old_log_probs, 0)
    delta = np.where(mask, log_probs - given.ref_log_probs, 0)
    s = np.exp(d.sum(-1, keepdims=True) / count)
    clipped = np.clip(s, 1 - 3e-4, 1 + 4e-4)
    surrogate = np.minimum(s * advantages, clipped * advantages)
    return np.sum(weights * (0.5 * s * (np.exp(-delta) + delta - 1) - surrogate))

  value, gradient = jax.value_and_grad(lambda x: ours(x, rollout)[0])(given.log_probs)
  np.testing.assert_allclose(value, theirs(given.log_probs), rtol=1e-12)
  expected = numeric(theirs, given.log_probs, mask)
  np.testing.assert_allclose(gradient, expected, atol=1e-7 * np.abs(expected).max())
  # The control: `unbiased` weighs each token by its own ratio.
  other = ours.replace(divergence=divergences.unbiased)
  difference = jax.grad(lambda x: other(x, rollout)[0])(given.log_probs) - gradient
  assert np.abs(difference).max() > 1e-3 * np.abs(gradient).max()


def test_luspo_with_a_penalty_does_not_depend_on_padding(x64):
  """There a loss that has become one of tokens is averaged over all columns, padding included."""
  given = data()
  objective = gpo.luspo().replace(divergence=divergences.k3, beta=0.5)

  def losses(width):
    pad = lambda x: np.pad(x, ((0, 0), (0, 0), (0, width)))
    fields = {k: pad(v) if v.ndim == 3 else v for k, v in vars(given).items()}
    padded = type(given)(**fields)
    rollout = padded.prepare(objective)
    loss, terms = objective(padded.log_probs, rollout)
    lengths = padded.mask.sum(-1).astype(float)
    per_column = np.where(padded.mask, terms.loss, 0).mean(-1) * lengths
    return float(loss), float(per_column.sum() / (lengths > 0).sum())

  (ours, theirs), (ours_padded, theirs_padded) = losses(0), losses(4)
  np.testing.assert_allclose(ours_padded, ours, rtol=1e-12)
  assert abs(theirs_padded - theirs) > 0.1 * abs(theirs)


def test_vespo_counts_active_tokens_only(x64):
  """There the sampler's log weights of masked columns are added too."""
  given = data()
  old = np.where(given.mask, given.old_log_probs, 7.0)
  same = type(given)(**vars(given) | {"old_log_probs": old})
  losses = [gpo.vespo()(b.log_probs, b.prepare(gpo.vespo()))[0] for b in (given, same)]
  assert losses[0] == losses[1]
  active = np.sum(given.log_probs - old, -1, where=given.mask)
  assert np.abs(np.sum(given.log_probs - old, -1) - active).max() > 1  # what they would add


def test_delta_of_two_sided_clipping_is_max_ratio(x64):
  given, delta = data(), 1.5
  two_sided = partial(surrogates.clip, epsilon_low=0.2, epsilon_high=0.28, max_ratio=delta)
  objective = gpo.dapo().replace(surrogate=two_sided)
  rollout = given.prepare(objective)
  a = np.broadcast_to(np.asarray(rollout.advantages), given.mask.shape)
  ratio = np.exp(given.log_probs - given.old_log_probs) * 1.0
  expected = np.minimum(np.minimum(ratio, delta) * a, np.clip(ratio, 0.8, 1.28) * a)
  _, terms = objective(given.log_probs, rollout)
  np.testing.assert_allclose(terms.surrogate[given.mask], expected[given.mask], rtol=1e-12)


# --- verl, NeMo-RL, prime-rl ---------------------------------------------------------------------


def active(given, x):
  return np.where(given.mask, x, 0) / given.mask.sum()


@pytest.mark.parametrize(("eps", "expected"), [(1e-6, 0.007), (1e-9, 0.8)])
def test_equal_rewards_elsewhere_are_rounding_over_eps(eps, expected):
  rewards = np.full(7, 0.1, np.float32)
  textbook = (rewards - rewards.mean()) / (rewards.std(ddof=1) + np.float32(eps))
  np.testing.assert_allclose(np.abs(textbook).max(), expected, rtol=0.1)
  assert not np.any(advantages.standardize(rewards, eps=eps))


def test_trls_default_of_cispo_divides_the_gradient_by_five():
  """On-policy every ratio is 1, and the bound of 0.2 is the weight."""
  given = data()
  gradients = []
  for high in (0.2, 4.0):
    objective = gpo.cispo(high=high)
    rollout = given.prepare(objective, old_log_probs=None, sampler_log_probs=None)
    loss = lambda x, objective=objective, rollout=rollout: objective(x, rollout)[0]
    gradients.append(np.asarray(jax.grad(loss)(given.log_probs)))
  np.testing.assert_allclose(5 * gradients[0], gradients[1], rtol=1e-5)
  assert np.any(gradients[0])


def test_verls_k3_has_no_gradient_beyond_its_clamp():
  """k3 of log π_ref − log π passes 10 above 2.61 and below −11."""
  k3 = lambda delta: np.exp(delta) - delta - 1
  assert k3(2.60) < 10 < k3(2.62)
  assert k3(-10.9) < 10 < k3(-11.0)


def test_verls_k2_is_not_bounded():
  delta = jnp.array([-30.0])
  assert float(divergences.k2(delta, None, None)[0]) == 450  # what it is without the bound
  mask = jnp.ones((1, 1, 1), bool)
  objective = gpo.grpo(beta=1.0).replace(divergence=divergences.k2)
  rollout = objective.prepare(
    advantages=jnp.zeros((1, 1)), mask=mask, ref_log_probs=-jnp.ones(mask.shape)
  )
  assert float(objective(jnp.full(mask.shape, -31.0), rollout)[0]) == 200


def test_verls_geometric_mean_of_the_samplers_weights(x64):
  """`geo_mean` with `rollout_is`: a response's weight is the geometric mean of its tokens'."""
  given = data()
  mean_weight = lambda x, ro: jnp.exp(ro.mean(jnp.log(corrections.truncate_importance(x, ro))))
  objective = gpo.gmpo().replace(corrections=(mean_weight,))
  _, terms = objective(given.log_probs, given.prepare(objective))
  w = np.minimum(given.old_log_probs - given.sampler_log_probs, np.log(2.0))
  count = np.maximum(given.mask.sum(-1, keepdims=True), 1)
  expected = np.exp(np.sum(w, -1, where=given.mask, keepdims=True) / count) + 0 * w
  np.testing.assert_allclose(terms.factor[given.mask], expected[given.mask], rtol=1e-12)


def test_verls_reinforce_in_bypass_mode_with_weights_of_responses(x64):
  """w = min(Π π/μ, 2) of the current policy, without gradient, times A log π."""
  given = data()
  product = partial(corrections.truncate_importance, cap=2.0, level=levels.sequence_product)
  objective = gpo.gpg().replace(corrections=(product,))
  rollout = given.prepare(objective, old_log_probs=None)
  gradient = jax.grad(lambda x: objective(x, rollout)[0])(given.log_probs)
  log_w = np.sum(given.log_probs - given.sampler_log_probs, -1, where=given.mask, keepdims=True)
  advantages = np.asarray(rollout.advantages)
  expected = -active(given, np.minimum(np.exp(log_w), 2.0) * advantages)
  np.testing.assert_allclose(gradient, expected, rtol=1e-11, atol=1e-15)


def test_remax_is_an_advantage_against_the_greedy_response(x64):
  """There A_t = R − R_greedy at every token, not relative to the group."""
  given = data()
  greedy = np.linspace(-1, 1, len(given.rewards))
  objective = gpo.gpg()
  rollout = given.prepare(objective, rewards=None, advantages=given.rewards - greedy[:, None])
  gradient = jax.grad(lambda x: objective(x, rollout)[0])(given.log_probs)
  advantages = given.rewards - greedy[:, None]
  expected = -active(given, advantages[..., None])
  np.testing.assert_allclose(gradient, expected, rtol=1e-12)
  relative = jax.grad(lambda x: objective(x, given.prepare(objective))[0])(given.log_probs)
  assert np.abs(relative - gradient).max() > 0.1 * np.abs(gradient).max()


def test_verls_optimal_token_baseline(x64):
  """B_t = ΣGW/ΣW of the group's responses that reach t, W_t = Σ_{s≤t} (1 − 2π_s + Σ_v π_s(v)²)."""
  given, rng = data(), np.random.default_rng(0)
  mask = given.mask
  hidden, unembedding = rng.normal(size=(*mask.shape, 5)), rng.normal(size=(7, 5))
  tokens, returns = rng.integers(0, 7, mask.shape), np.where(mask, given.rewards[..., None], 0)

  log_probs = gpo.linear_token_log_probs(hidden, unembedding, tokens, mask=mask).log_probs
  squares = lambda log_p, _: jnp.sum(jnp.exp(2 * log_p), -1)
  square = gpo.linear_divergence(squares, hidden, unembedding, hidden, unembedding, mask=mask)
  w = jnp.where(mask, jnp.cumsum(jnp.where(mask, 1 - 2 * jnp.exp(log_probs) + square, 0), -1), 0)
  total = jnp.sum(w, -2, keepdims=True)
  baseline = jnp.sum(returns * w, -2, keepdims=True) / jnp.where(total == 0, 1, total)
  rollout = given.prepare(gpo.gpg(), rewards=None, advantages=returns - baseline)

  logits = hidden @ unembedding.T
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  for group in range(len(mask)):
    rows = [list(np.flatnonzero(row)) for row in mask[group]]
    for t in range(mask.shape[-1]):
      going = [i for i, row in enumerate(rows) if t in row]
      if not going:
        continue
      energy = {
        i: sum(
          1 - 2 * p[group, i, s, tokens[group, i, s]] + (p[group, i, s] ** 2).sum()
          for s in rows[i]
          if s <= t
        )
        for i in going
      }
      b = sum(given.rewards[group, i] * energy[i] for i in going) / sum(energy.values())
      for i in going:
        found = float(rollout.advantages[group, i, t])
        np.testing.assert_allclose(found, given.rewards[group, i] - b, rtol=1e-9, atol=1e-12)
  mean = returns.sum(-2, keepdims=True) / np.maximum(mask.sum(-2, keepdims=True), 1)
  assert np.abs(np.where(mask, mean - baseline, 0)).max() > 0.01  # all weights alike: the control


def test_nemos_k3_has_the_gradient_of_k2(x64):
  """There k3 is multiplied by e^(log π − sg log π), which is 1 and differentiable."""
  given = data()
  delta = given.log_probs - given.ref_log_probs

  def theirs(x):
    d = x - given.ref_log_probs
    return jnp.sum(jnp.exp(x - given.log_probs) * (jnp.exp(-d) + d - 1), where=given.mask)

  value, gradient = jax.value_and_grad(theirs)(given.log_probs)
  ours = lambda x: jnp.sum(
    divergences.straight_through(x - given.ref_log_probs, None, None), where=given.mask
  )
  found = jax.value_and_grad(ours)(given.log_probs)
  np.testing.assert_allclose(found[0], value, rtol=1e-12)
  np.testing.assert_allclose(found[1], gradient, rtol=1e-10, atol=1e-12)
  np.testing.assert_allclose(gradient, np.where(given.mask, delta, 0), rtol=1e-10, atol=1e-12)
  plain = jax.grad(lambda x: jnp.sum(divergences.k3(x - given.ref_log_probs, None, None)))
  assert np.abs(np.where(given.mask, plain(given.log_probs) - gradient, 0)).max() > 0.01


def test_nemos_kl_weighted_from_the_sampler(x64):
  given = data()
  weighted = lambda d, r, ro: divergences.unbiased(
    d, r + ro.old_log_probs - ro.sampler_log_probs, ro
  )
  objective = gpo.dapo().replace(divergence=weighted, beta=1.0)
  rollout = given.prepare(objective).replace(advantages=np.zeros((4, 4)))
  gradient = jax.grad(lambda x: objective(x, rollout)[0])(given.log_probs)
  ratio = np.exp(given.log_probs - given.sampler_log_probs)
  expected = active(given, ratio * (given.log_probs - given.ref_log_probs))
  np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-14)


def test_prime_rls_default_loss(x64):
  """−keep A π/μ + τ (log π − log μ)², over tokens; the ratio is to the sampler."""
  given = data()
  penalty = gpo.tokenwise(lambda ref_log_ratio, log_ratio, rollout: log_ratio**2)
  objective = gpo.dppo(low=0.05, high=0.1).replace(
    advantage=gpo.advantages.center, divergence=penalty, beta=0.3
  )
  sampler = given.sampler_log_probs
  rollout = objective.prepare(given.rewards, given.mask, sampler)
  loss, gradient = jax.value_and_grad(lambda x: objective(x, rollout)[0])(given.log_probs)
  a = np.broadcast_to(np.asarray(rollout.advantages), given.mask.shape)
  ratio, moved = np.exp(given.log_probs - sampler), np.exp(given.log_probs) - np.exp(sampler)
  keep = ~np.where(a > 0, moved > 0.1, moved < -0.05)
  assert 0 < keep[given.mask & (a != 0)].mean() < 1
  drift = given.log_probs - sampler
  losses = 0.3 * drift**2 - keep * a * ratio
  np.testing.assert_allclose(loss, losses[given.mask].mean(), rtol=1e-12)
  slopes = 0.6 * drift - keep * a * ratio
  np.testing.assert_allclose(gradient, active(given, slopes), rtol=1e-10, atol=1e-14)


def test_a_sum_of_penalties(x64):
  given = data()
  both = lambda d, r, ro: divergences.unbiased(d, r, ro) + 0.1 * r**2
  objective = gpo.grpo(beta=0.5).replace(divergence=both)
  one = gpo.grpo(beta=0.5).replace(divergence=divergences.unbiased)
  other = gpo.dapo().replace(divergence=lambda d, r, ro: r**2, beta=0.05)
  rollout = given.prepare(objective).replace(advantages=np.zeros((4, 4)))
  losses = [o(given.log_probs, rollout)[0] for o in (objective, one, other)]
  np.testing.assert_allclose(losses[0], losses[1] + losses[2], rtol=1e-12)
