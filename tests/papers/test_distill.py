"""`distill`: what its gradient is, over all tokens and all sequences, on-policy and off."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax import divergences, surrogates, weightings
from gpo_jax.linear import one_pass

RNG = np.random.default_rng(0)
TEACHER, STUDENT, STALE = RNG.normal(size=(3, 1 + 3, 3))  # logits of three tokens after four states
SEQUENCES = np.array(list(itertools.product(range(3), repeat=2)))  # two tokens; state: the first


def log_probs_of(logits, sequences=SEQUENCES):
  table = jax.nn.log_softmax(logits, axis=-1)
  return jnp.stack([table[0, sequences[:, 0]], table[1 + sequences[:, 0], sequences[:, 1]]], -1)


def sequence_kl(logits):
  """KL(student‖teacher) over whole responses."""
  student, teacher = log_probs_of(logits).sum(-1), log_probs_of(jnp.asarray(TEACHER)).sum(-1)
  return jnp.sum(jnp.exp(student) * (student - teacher))


def token_kl_of_states(logits, visits):
  """KL(student‖teacher) of each position, at states as the sampler visits them."""
  student, teacher = (jax.nn.log_softmax(x, -1) for x in (logits, jnp.asarray(TEACHER)))
  return visits @ jnp.sum(jnp.exp(student) * (student - teacher), axis=-1)


def expected_gradient(objective, sampler):
  """E of the gradient: every response, weighed by how likely it is sampled."""
  mask = jnp.ones((len(SEQUENCES), 1, 2), bool)
  old = log_probs_of(jnp.asarray(sampler))
  one = lambda x: x[:, None]
  prepared = objective.prepare(
    mask=mask, old_log_probs=one(old), ref_log_probs=one(log_probs_of(jnp.asarray(TEACHER)))
  )
  chance = jnp.exp(old.sum(-1))[:, None, None] * len(SEQUENCES)
  rollout = prepared.replace(weights=prepared.weights * chance)
  return jax.jit(jax.grad(lambda x: objective(one(log_probs_of(x)), rollout)[0]))


@pytest.mark.quick("off-policy")
@pytest.mark.parametrize("sampler", [STUDENT, STALE], ids=["on-policy", "off-policy"])
def test_of_tokens(sampler, x64):
  """The KL of tokens, with states as the sampler visits them; the mean over two tokens."""
  found = expected_gradient(gpo.distill(beta=1.0), sampler)(jnp.asarray(STUDENT))
  visits = np.concatenate([[1.0], np.exp(jax.nn.log_softmax(sampler[0]))])
  expected = jax.grad(token_kl_of_states)(jnp.asarray(STUDENT), visits) / 2
  np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
  # The controls: k3 has the gradient of the other KL, and k1 none but noise.
  for divergence in (divergences.k3, divergences.k1):
    other = expected_gradient(gpo.distill().replace(divergence=divergence), sampler)
    assert np.abs(other(jnp.asarray(STUDENT)) - expected).max() > 1e-2


@pytest.mark.quick("off-policy")
@pytest.mark.parametrize("sampler", [STUDENT, STALE], ids=["on-policy", "off-policy"])
def test_of_sequences(sampler, x64):
  whole = gpo.distill().replace(
    divergence=divergences.sequence_unbiased, weighting=weightings.sequence_sum
  )
  expected = jax.grad(sequence_kl)(jnp.asarray(STUDENT))
  found = expected_gradient(whole, sampler)(jnp.asarray(STUDENT))
  np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
  # The control: token by token, what the first token does to the second is missing.
  tokens = gpo.distill().replace(weighting=weightings.sequence_sum)
  assert np.abs(expected_gradient(tokens, sampler)(jnp.asarray(STUDENT)) - expected).max() > 1e-2


def test_it_needs_no_rewards_and_takes_advantages(x64):
  teacher, student, old = RNG.normal(-1.5, 0.3, size=(3, 2, 3, 4))
  mask = RNG.random((2, 3, 4)) < 0.8
  given = {"mask": mask, "old_log_probs": old, "ref_log_probs": np.where(mask, teacher, np.nan)}
  objective = gpo.distill(beta=0.5)
  rollout = objective.prepare(**given)
  np.testing.assert_array_equal(rollout.advantages, 0)
  value, gradient = jax.value_and_grad(lambda x: objective(x, rollout)[0])(student)
  ratio, delta = np.exp(student - old), student - teacher
  losses = 0.5 * ratio * (np.exp(-delta) + delta - 1)
  np.testing.assert_allclose(value, losses[mask].mean(), rtol=1e-12)
  slopes = np.where(mask, 0.5 * ratio * delta, 0) / mask.sum()
  np.testing.assert_allclose(gradient, slopes, rtol=1e-11, atol=1e-15)
  advantages = RNG.normal(size=(2, 3))
  both = objective.prepare(advantages=advantages, **given)
  more = jax.grad(lambda x: objective(x, both)[0])(student)
  rewarded = np.where(mask, ratio * advantages[..., None], 0) / mask.sum()
  np.testing.assert_allclose(more, slopes - rewarded, rtol=1e-11, atol=1e-15)
  with pytest.raises(ValueError, match="no advantage function for rewards"):
    objective.prepare(rewards=advantages, **given)
  with pytest.raises(ValueError, match=r"unbiased needs rollout.ref_log_probs"):
    objective(student, rollout.replace(ref_log_probs=None))
  packed = objective.prepare(**given, segment_ids=np.ones((2, 3, 4), int))
  np.testing.assert_allclose(objective(student, packed)[0], value, rtol=1e-12)


def test_on_policy_it_is_the_teachers_log_ratio_as_an_advantage(x64):
  """NeMo-RL's and prime-rl's form: A = sg(log π_teacher − log π), token by token."""
  teacher, student = RNG.normal(-1.5, 0.3, size=(2, 1, 2, 3))
  mask = np.ones((1, 2, 3), bool)
  ours = gpo.distill()
  rollout = ours.prepare(mask=mask, ref_log_probs=teacher)
  theirs = gpo.ppo().replace(surrogate=surrogates.reinforce)
  other = theirs.prepare(advantages=teacher - student, mask=mask)
  gradients = [
    jax.grad(lambda x: o(x, r)[0])(student) for o, r in ((ours, rollout), (theirs, other))
  ]
  np.testing.assert_allclose(*gradients, rtol=1e-12)


def test_from_hidden_states_it_takes_one_pass():
  assert one_pass.is_enough(gpo.distill())
  assert one_pass.is_enough(gpo.ppo())
