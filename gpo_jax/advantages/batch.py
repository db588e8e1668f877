"""Advantages whose statistics are over the whole batch."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np

from gpo_jax._inputs import as_array, describe, promote
from gpo_jax.advantages.grouping import by_group
from gpo_jax.advantages.groups import standardize
from gpo_jax.advantages.samples import samples
from gpo_jax.traits import slot_function


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
  rewards, where = samples(rewards, where)
  flat = standardize(rewards.ravel(), where.ravel(), ddof=ddof, eps=eps)
  return flat.reshape(rewards.shape)


@slot_function(of_batch=True, of_kinds=True, arrays=("weights",))
def decoupled(
  rewards: jax.Array,
  where: jax.Array | None = None,
  group_ids: jax.Array | None = None,
  *,
  weights: jax.Array | None = None,
  ddof: chex.Numeric = 1,
  eps: chex.Numeric = 1e-4,
) -> jax.Array:
  """Standardises each reward separately, then sums them, so that none drowns the others.

      A = batch_standardize(Σ_k w_k standardize(R_k))

  Args:
    rewards: R, `[K, ..., G]`: K kinds of reward of each sample.
    where: the samples that count, `[..., G]`.
    group_ids: of each sample, `[..., G]`, for groups that are not the last axis; to an objective
      pass them by `prepare(group_ids=…)`.
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
  of_group = partial(standardize, ddof=ddof, eps=eps)
  if group_ids is not None:
    of_group = partial(by_group, of_group, group_ids=group_ids)
  each = jax.vmap(lambda r: of_group(r, where=where))(rewards)
  return batch_standardize(jnp.tensordot(weights, each, 1), where, ddof=ddof, eps=eps)
