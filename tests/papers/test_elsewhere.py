"""TRL and Liger-Kernel under the same names: equal, or different for a stated reason."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import gpo_jax as gpo
from gpo_jax import divergences, levels, surrogates
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
