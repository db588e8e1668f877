"""The evaluation of a policy, with no sampling noise in its accuracies."""

import jax
import jax.numpy as jnp

from . import task
from .policy import Policy, answer_distributions, pick, sample

Metrics = dict[str, jax.Array]


@jax.jit
def evaluate(
  policy: Policy, reference: Policy, problems: jax.Array, key: jax.Array
) -> tuple[Metrics, jax.Array]:
  """Measures a policy on problems [N].

  Args:
    policy: the policy to measure.
    reference: the policy from which its divergence is measured.
    problems: the problems to answer, shape [N].
    key: for the answers on which the divergence is measured.

  Returns:
    The metrics, and sampled answers, shape [N, T]. `sampled` is the probability that an answer
    sampled at temperature 1 is right, which is the likelihood of the right answer; `greedy` the
    fraction of problems where each token of the right answer is the most likely; `divergence` an
    estimate of KL(policy‖reference) per answer, in nats.
  """
  prompts, right = task.pose(problems)
  mask = task.answer_mask(right)
  distributions = answer_distributions(policy, prompts, right)
  log_likelihoods = jnp.sum(pick(distributions, right), axis=-1, where=mask)
  greedy = (jnp.argmax(distributions, axis=-1) == right) | ~mask
  answers, _ = sample(policy, prompts, key)
  metrics = {
    "sampled": jnp.mean(jnp.exp(log_likelihoods)),
    "greedy": jnp.mean(jnp.all(greedy, axis=-1)),
    "divergence": jnp.mean(_divergence(policy, reference, prompts, answers)),
  }
  return metrics, answers


def _divergence(
  policy: Policy, reference: Policy, prompts: jax.Array, answers: jax.Array
) -> jax.Array:
  # Exact at each token given those before it, which leaves less noise than the sampled log-ratios.
  p = answer_distributions(policy, prompts, answers)
  q = answer_distributions(reference, prompts, answers)
  per_token = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
  return jnp.sum(per_token, axis=-1, where=task.answer_mask(answers))
