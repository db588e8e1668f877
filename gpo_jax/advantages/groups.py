"""Advantages of groups: a sample's reward relative to the others of its group."""

import chex
import jax
import jax.numpy as jnp

from gpo_jax._inputs import as_array, as_scalar, check_same_shape
from gpo_jax.advantages.samples import all_equal, deviations, groups, highest
from gpo_jax.traits import slot_function


@slot_function(of_group=True)
def center(rewards: jax.Array, where: jax.Array | None = None) -> jax.Array:
  """Subtracts the group's mean.

      A_i = R_i − mean(R)

  The mean includes the sample itself: the expected gradient is (G−1)/G of the policy gradient.

  Example:
    >>> print(center(jnp.array([1.0, 0.0, 0.0, 1.0])))
    [ 0.5 -0.5 -0.5  0.5]

  Reference: Liu et al. (2025, Dr. GRPO), arXiv:2503.20783.
  """
  rewards, where, count = groups(rewards, where)
  return deviations(rewards, where, count)


@jax.jit
def _divide_by_std(centered, where, count, ddof, eps) -> jax.Array:
  # In units of the largest deviation neither 1e30 nor 1e-30 leaves float32's range when squared.
  scale = jnp.max(jnp.abs(centered), axis=-1, keepdims=True, where=where, initial=0)
  equal = ~jnp.any(where & (centered != 0), axis=-1, keepdims=True)
  unit = jnp.where(scale == 0, 1, scale)
  square = jnp.sum(jnp.where(where, centered / unit, 0) ** 2, axis=-1, keepdims=True)
  std = scale * jnp.sqrt(square / jnp.maximum(count - ddof, 1))
  # Equal rewards are 0/0 with eps = 0; a NaN is not equal to 0 and stays.
  return jnp.where(where & ~equal, centered / jnp.where(equal, 1, std + eps), 0)


@slot_function(of_group=True)
def standardize(
  rewards: jax.Array,
  where: jax.Array | None = None,
  *,
  ddof: chex.Numeric = 1,
  eps: chex.Numeric = 1e-4,
) -> jax.Array:
  """Subtracts the group's mean and divides by its standard deviation.

      A_i = (R_i − mean(R)) / (std(R) + eps)

  Args:
    ddof: the variance is Σ(R−mean)²/(G−ddof): 1 in TRL, Tunix, verl, slime and OpenRLHF, 0 in
      MaxText and EasyDeL. The paper does not say.
    eps: added to the standard deviation: 1e-4 in TRL and EasyDeL, 1e-6 in Tunix, verl and slime,
      1e-8 in MaxText, 1e-9 in OpenRLHF. 0 is the paper's formula, and safe here.

  Returns:
    A, `[..., G]`; 0 in a group of one or of equal rewards.

  Example:
    >>> print(standardize(jnp.array([1.0, 0.0, 0.0, 1.0]), ddof=0, eps=0.0))
    [ 1. -1. -1.  1.]

  Reference: Shao et al. (2024, GRPO), arXiv:2402.03300, section 4.1.2.
  """
  rewards, where, count = groups(rewards, where)
  settings = {"ddof": ddof, "eps": eps}
  ddof, eps = (jnp.asarray(as_scalar(*item), count.dtype) for item in settings.items())
  return _divide_by_std(deviations(rewards, where, count), where, count, ddof, eps)


@slot_function(of_group=True)
def leave_one_out(rewards: jax.Array, where: jax.Array | None = None) -> jax.Array:
  """Subtracts the mean of the group's other samples.

      A_i = R_i − (1/(G−1)) Σ_{j≠i} R_j

  The baseline does not depend on the sample, so the expected gradient is exactly the policy
  gradient.

  Args:
    rewards: R, `[..., G]`, G ≥ 2.

  Returns:
    A, `[..., G]`; 0 if only one sample of a group counts.

  Raises:
    ValueError: for G = 1, which has no others.

  Example:
    >>> print(leave_one_out(jnp.array([1.0, 0.0, 0.0])))
    [ 1.  -0.5 -0.5]

  Reference: Ahmadian et al. (2024, RLOO), arXiv:2402.14740.
  """
  rewards, where, count = groups(rewards, where)
  if rewards.shape[-1] == 1:
    raise ValueError(
      f"leave_one_out needs groups of at least 2; got rewards {list(rewards.shape)}, a group of 1: "
      "sample more responses per prompt, or use batch_standardize"
    )
  # Excluding R_i from the mean scales its deviation by G/(G−1).
  return deviations(rewards, where, count, 1 / jnp.maximum(count - 1, 1))


@slot_function(of_group=True)
def max_rl(rewards: jax.Array, where: jax.Array | None = None) -> jax.Array:
  """Divides by the group's mean: rare successes count for more.

      A_i = (R_i − mean(R)) / mean(R),   0 if mean(R) ≤ 0

  Args:
    rewards: R ≥ 0, `[..., G]`.

  Example:
    >>> print(max_rl(jnp.array([1.0, 0.0, 0.0, 0.0])))
    [ 3. -1. -1. -1.]

  Reference: MaxRL (2026), arXiv:2602.02710.
  """
  rewards, where, count = groups(rewards, where)
  mean = jnp.sum(rewards, -1, keepdims=True) / count
  advantages = deviations(rewards, where, count) / jnp.where(mean <= 0, 1, mean)
  return jnp.where(where & ~(mean <= 0), advantages, 0)  # a NaN is not at most 0 and stays


@slot_function(of_group=True)
def pass_at_k(rewards: jax.Array, where: jax.Array | None = None) -> jax.Array:
  """Rewards only the group's best sample, with its lead over the second best.

      A_best = R_(1) − R_(2),   0 for all others

  Returns:
    A, `[..., G]`; 0 for a shared first place, and if only one sample counts.

  Example:
    >>> print(pass_at_k(jnp.array([0.5, 2.0, 1.5])))
    [0.  0.5 0. ]

  Reference: the `grpo_passk` estimator of verl, without its division by the standard deviation.
  """
  rewards, where, count = groups(rewards, where)
  ranked = jnp.where(where, rewards, -jnp.inf)
  best = jax.nn.one_hot(jnp.argmax(ranked, axis=-1), rewards.shape[-1], dtype=bool)
  lead = rewards - highest(rewards, where & ~best)
  return jnp.where(best & (count > 1), lead, rewards - rewards)  # 0, or NaN


@slot_function(of_group=True, arrays=("lengths",))
def optimal_baseline(
  rewards: jax.Array, where: jax.Array | None = None, *, lengths: jax.Array
) -> jax.Array:
  """Subtracts the group's mean weighted by response lengths.

      A_i = R_i − Σ_j L_j R_j / Σ_j L_j

  The baseline of least variance if the squared norms of responses' gradients are proportional to
  length. In an objective:

      objective.replace(advantage=partial(optimal_baseline, lengths=mask.sum(-1)))

  In packed rows with S rewards, stack `jnp.sum(mask * (segment_ids == s), -1)` for s = 1 … S along
  the last axis.

  Args:
    lengths: L ≥ 0, tokens per response, `[..., G]`; with `group_ids` flat, `lengths.ravel()`. In a
      group of lengths 0 the baseline is the mean.

  Example:
    >>> print(optimal_baseline(jnp.array([1.0, 0.0]), lengths=jnp.array([3, 1])))
    [ 0.25 -0.75]

  Reference: Hao et al. (2025, OPO), arXiv:2505.23585.
  """
  rewards, where, count = groups(rewards, where)
  tokens = as_array("lengths", lengths)
  remedy = ". Pass one length per reward: in packed rows each segment's, with group_ids "
  remedy += "lengths.ravel()"
  check_same_shape(remedy, rewards=rewards, lengths=tokens)
  lengths = jnp.where(where, jnp.asarray(tokens, rewards.dtype), 0)
  deviation = deviations(rewards, where, count)
  total = jnp.sum(lengths, -1, keepdims=True)
  baseline = jnp.sum(lengths * deviation, -1, keepdims=True) / jnp.where(total == 0, 1, total)
  return jnp.where(where, deviation - baseline, 0)


@slot_function(of_group=True)
def informative(rewards: jax.Array, where: jax.Array | None = None) -> jax.Array:
  """Marks the samples of groups whose rewards are not all equal.

      max(R) > min(R)

  Combined with the mask, other groups leave every denominator, as if they had not been sampled:
  `prepare(rewards, mask & informative(rewards)[..., None])`. Without it their tokens count, with
  advantage 0. Dynamic sampling (DAPO) is the former, with more prompts sampled in their place. For
  groups told apart by ids: `by_group(informative, rewards, group_ids)`.

  Returns:
    Bools, `[..., G]`, True if the sample counts and not all rewards of its group are equal.

  Example:
    >>> print(informative(jnp.array([[1.0, 0.0], [1.0, 1.0]])))
    [[ True  True]
     [False False]]

  Reference: Yu et al. (2025, DAPO), arXiv:2503.14476, Eq. 11.
  """
  rewards, where, _ = groups(rewards, where)
  return where & ~all_equal(rewards, where)
