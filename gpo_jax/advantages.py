"""Advantages: a sample's reward relative to its group.

Each is `(rewards, where=None, *, …) -> advantages`, `[..., G]` to `[..., G]`; the group is the last
axis. `where`, bools or 0/1 of that shape, marks the samples that count, all if None: the others are
in no statistic and have advantage 0. A group whose rewards are all equal has advantage exactly 0:
rewards are shifted by their group's maximum first, so that no rounding error is left for a small
standard deviation to blow up. A reward that is not finite makes its whole group NaN. (The group of
`batch_standardize`, and of the last step of `decoupled`, is the batch.) No gradient flows to the
rewards.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from gpo_jax._inputs import (
  as_array,
  as_ids,
  as_scalar,
  check_returned,
  check_same_shape,
  describe,
  promote,
)
from gpo_jax._mesh import whole
from gpo_jax._slots import as_data
from gpo_jax.traits import slot_function, traits_of


def _samples(rewards: jax.Array, where: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  (rewards,) = promote(as_array("rewards", rewards))
  if not rewards.ndim or not rewards.size:
    raise ValueError(f"rewards must be [..., G] and not empty; got shape {list(rewards.shape)}")
  counts = jnp.ones_like(rewards) if where is None else as_array("where", where)
  check_same_shape(rewards=rewards, where=counts)
  where = jnp.asarray(counts).astype(bool)
  return jnp.where(where, jax.lax.stop_gradient(rewards), 0), where


def _groups(rewards: jax.Array, where: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
  rewards, where = _samples(rewards, where)
  # By every formula NaN and ±∞ make their whole group NaN. Set explicitly, because XLA's maximum
  # over 4096 numbers on CPU may overlook a NaN.
  bad = jnp.any(~jnp.isfinite(rewards), axis=-1, keepdims=True)
  rewards = jnp.where(bad & where, jnp.nan, rewards)
  count = jnp.sum(where.astype(rewards.dtype), axis=-1, keepdims=True)
  return rewards, where, jnp.maximum(count, 1)


def _shift(rewards: jax.Array, where: jax.Array) -> jax.Array:
  """Subtracts the largest reward of the group that counts; 0 at rewards that do not."""
  top = jnp.max(rewards, axis=-1, keepdims=True, where=where, initial=-jnp.inf)
  return jnp.where(where, rewards - top, 0)


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
  rewards, where, count = _groups(rewards, where)
  shifted = _shift(rewards, where)
  return jnp.where(where, shifted - jnp.sum(shifted, -1, keepdims=True) / count, 0)


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
  rewards, where, count = _groups(rewards, where)
  settings = {"ddof": ddof, "eps": eps}
  ddof, eps = (jnp.asarray(as_scalar(*item), count.dtype) for item in settings.items())
  return _divide_by_std(center(rewards, where), where, count, ddof, eps)


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
  rewards, where, count = _groups(rewards, where)
  if rewards.shape[-1] == 1:
    raise ValueError(
      f"leave_one_out needs groups of at least 2; got rewards {list(rewards.shape)}, a group of 1: "
      "sample more responses per prompt, or use batch_standardize"
    )
  shifted = _shift(rewards, where)
  others = jnp.sum(shifted, -1, keepdims=True) - shifted
  alone = shifted - shifted  # 0, or NaN
  advantages = jnp.where(count > 1, shifted - others / jnp.maximum(count - 1, 1), alone)
  return jnp.where(where, advantages, 0)


@slot_function(of_batch=True)
def batch_standardize(
  rewards: jax.Array,
  where: jax.Array | None = None,
  *,
  ddof: chex.Numeric = 1,
  eps: chex.Numeric = 1e-8,
) -> jax.Array:
  """Subtracts the mean of the whole batch and divides by its standard deviation.

      A_i = (R_i − mean_batch(R)) / (std_batch(R) + eps)

  With a group baseline first (REINFORCE++-baseline): `batch_standardize(center(rewards))`.

  Args:
    rewards: R, any shape: everything that one optimizer step sees.
    ddof: as in `standardize`.
    eps: added to the standard deviation.

  Example:
    >>> print(batch_standardize(jnp.array([[1.0, 1.0], [0.0, 0.0]]), ddof=0))
    [[ 1.  1.]
     [-1. -1.]]

  Reference: Hu et al. (2025, REINFORCE++), arXiv:2501.03262.
  """
  rewards, where = _samples(rewards, where)
  flat = standardize(rewards.ravel(), where.ravel(), ddof=ddof, eps=eps)
  return flat.reshape(rewards.shape)


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
  rewards, where, count = _groups(rewards, where)
  mean = jnp.sum(jnp.where(where, rewards, 0), -1, keepdims=True) / count
  advantages = center(rewards, where) / jnp.where(mean <= 0, 1, mean)
  return jnp.where(where & ~(mean <= 0), advantages, 0)  # a NaN is not at most 0 and stays


@slot_function(of_group=True)
def pass_at_k(rewards: jax.Array, where: jax.Array | None = None) -> jax.Array:
  """Rewards only the group's best sample, by its lead over the second best.

      A_best = R_(1) − R_(2),   0 for all others

  Returns:
    A, `[..., G]`; 0 for a shared first place, and if only one sample counts.

  Example:
    >>> print(pass_at_k(jnp.array([0.5, 2.0, 1.5])))
    [0.  0.5 0. ]

  Reference: the `grpo_passk` estimator of verl, without its division by the standard deviation.
  """
  rewards, where, count = _groups(rewards, where)
  shifted = _shift(rewards, where)
  ranked = jnp.where(where, rewards, -jnp.inf)
  best = jax.nn.one_hot(jnp.argmax(ranked, axis=-1), rewards.shape[-1], dtype=bool)
  second = jnp.max(shifted, axis=-1, keepdims=True, where=where & ~best, initial=-jnp.inf)
  others = shifted - shifted  # 0, or NaN
  return jnp.where(where, jnp.where(best & (count > 1), others - second, others), 0)


@slot_function(of_group=True, arrays=("lengths",))
def optimal_baseline(
  rewards: jax.Array, where: jax.Array | None = None, *, lengths: jax.Array
) -> jax.Array:
  """Subtracts the group's mean weighted by response lengths.

      A_i = R_i − Σ_j L_j R_j / Σ_j L_j

  The baseline of least variance if the squared norms of responses' gradients grow with length. In
  an objective: `objective.replace(advantage=partial(optimal_baseline, lengths=mask.sum(-1)))`. For
  packed rows with S rewards each, the lengths are `jnp.sum(mask * (segment_ids == s), -1)` for s in
  1 … S, stacked along the last axis.

  Args:
    lengths: L ≥ 0, tokens per response, `[..., G]`; with `group_ids` flat, `lengths.ravel()`.

  Example:
    >>> print(optimal_baseline(jnp.array([1.0, 0.0]), lengths=jnp.array([3, 1])))
    [ 0.25 -0.75]

  Reference: Hao et al. (2025, OPO), arXiv:2505.23585.
  """
  rewards, where, _ = _groups(rewards, where)
  tokens = as_array("lengths", lengths)
  remedy = ". Pass one length per reward: in packed rows each segment's, with group_ids "
  remedy += "lengths.ravel()"
  check_same_shape(remedy, rewards=rewards, lengths=tokens)
  lengths = jnp.where(where, jnp.asarray(tokens, rewards.dtype), 0)
  shifted = _shift(rewards, where)
  total = jnp.sum(lengths, -1, keepdims=True)
  baseline = jnp.sum(lengths * shifted, -1, keepdims=True) / jnp.where(total == 0, 1, total)
  return jnp.where(where, shifted - baseline, 0)


@slot_function(of_batch=True, of_kinds=True, arrays=("weights",))
def decoupled(
  rewards: jax.Array,
  where: jax.Array | None = None,
  *,
  weights: jax.Array | None = None,
  ddof: chex.Numeric = 1,
  eps: chex.Numeric = 1e-4,
) -> jax.Array:
  """Standardises each reward separately, then sums them, so that none drowns the others.

      A = batch_standardize(Σ_k w_k standardize(R_k))

  Args:
    rewards: R, `[K, ..., G]`: K kinds of reward of each sample.
    weights: w, `[K]`; 1 each if None.
    ddof: as in `standardize`.
    eps: as in `standardize`.

  Example:
    >>> correct, short = jnp.array([1.0, 0.0]), jnp.array([0.0, 100.0])
    >>> print(decoupled(jnp.stack([correct, short]), weights=jnp.array([2.0, 1.0])))
    [ 0.707 -0.707]

  Reference: Liu et al. (2026, GDPO), arXiv:2601.05242.
  """
  (rewards,) = promote(as_array("rewards", rewards))
  if rewards.ndim < 2 or not rewards.size:
    got = f"got shape {list(rewards.shape)}"
    raise ValueError(f"decoupled needs rewards [K, ..., G], every axis at least 1; {got}")
  share = as_array("weights", np.ones(rewards.shape[0]) if weights is None else weights)
  if share.shape != rewards.shape[:1]:
    got = describe(rewards=rewards, weights=share)
    raise ValueError(f"decoupled needs weights [K], one for each kind of reward; got {got}")
  weights = jnp.asarray(share, rewards.dtype)
  each = jax.vmap(lambda r: standardize(r, where, ddof=ddof, eps=eps))(rewards)
  return batch_standardize(jnp.tensordot(weights, each, 1), where, ddof=ddof, eps=eps)


def by_group(
  advantage: Callable[[jax.Array, jax.Array], jax.Array],
  rewards: jax.Array,
  group_ids: jax.Array,
  where: jax.Array | None = None,
) -> jax.Array:
  """Applies an advantage to groups of uneven size, told apart by ids.

      A_i = advantage(R, where = {j : group_j = group_i})_i

  The advantage sees one group at a time, marked by `where`: a mean over the batch in a function of
  your own would be the group's. Outside of `jax.jit` a function of your own is compiled in each
  call, with what it closes over then. On a mesh with Explicit axes the result is not sharded.

  Args:
    advantage: a function of this module, or one like them.
    rewards: R, any shape: N samples in any order.
    group_ids: the group of each sample, of rewards' shape, any integers.
    where: the samples that count, of rewards' shape; all if None.

  Returns:
    A, of rewards' shape.

  Raises:
    ValueError: if `group_ids` are not integers of rewards' shape, and for `batch_standardize` and
      `decoupled`, whose statistics are over the batch: leave `group_ids` out with them.

  Example:
    >>> print(by_group(center, jnp.array([1.0, 0.0, 5.0]), jnp.array([7, 7, 3])))
    [ 0.5 -0.5  0. ]
  """
  if not callable(advantage):
    raise ValueError(f"advantage must be a function; got {advantage!r:.60}")
  if traits_of(advantage).of_batch:
    raise ValueError("the advantage is over the whole batch, not over groups: leave group_ids out")
  rewards, where = _samples(rewards, where)
  remedy = "number the groups, np.unique(group_ids, return_inverse=True)[1]"
  group_ids = as_ids("group_ids", group_ids, remedy)
  check_same_shape(rewards=rewards, group_ids=group_ids)
  flat, ids, where = (whole(x).ravel() for x in (rewards, group_ids, where))
  slot: Any = as_data("advantage", advantage)
  # Nothing that a function of this module closes over changes, so one compilation serves all calls.
  of_samples = _compiled if traits_of(advantage).ours else jax.jit(lambda *args: _of_samples(*args))
  return of_samples(slot, flat, ids, where).reshape(rewards.shape)


def _of_samples(slot: Partial, flat: jax.Array, ids: jax.Array, where: jax.Array) -> jax.Array:
  def of_sample(index: jax.Array) -> jax.Array:
    value = slot(flat, where & (ids == ids[index]))
    return check_returned("advantage", value, flat.shape, "sample")[index]

  # One pass over all samples for each: batches of them bound the memory to 64·N values.
  return jax.lax.map(of_sample, jnp.arange(flat.size), batch_size=min(64, flat.size))


_compiled = jax.jit(_of_samples)
