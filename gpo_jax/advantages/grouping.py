"""Groups of uneven size, told apart by ids."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from gpo_jax._inputs import as_ids, check_returned, check_same_shape
from gpo_jax._mesh import whole
from gpo_jax._ranges import is_unknown
from gpo_jax._slots import as_data, describe
from gpo_jax.advantages.samples import samples
from gpo_jax.traits import is_ours, traits_of


def by_group(
  advantage: Callable[..., jax.Array],
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
    rewards: R, any shape: N samples in any order; for `decoupled` K kinds of them, `[K, ...]`.
    group_ids: the group of each sample, of rewards' shape, any integers.
    where: the samples that count, of rewards' shape; all if None.

  Returns:
    A, of rewards' shape.

  Raises:
    ValueError: if `group_ids` are not integers of rewards' shape; if all of them differ, under an
      advantage relative to the group; and for `batch_standardize`, whose statistics are over the
      batch: leave `group_ids` out.

  Example:
    >>> from gpo_jax.advantages import center
    >>> print(by_group(center, jnp.array([1.0, 0.0, 5.0]), jnp.array([7, 7, 3])))
    [ 0.5 -0.5  0. ]
  """
  if not callable(advantage):
    raise ValueError(f"advantage must be a function; got {advantage!r:.60}")
  if traits_of(advantage).of_kinds:
    return advantage(rewards, where, group_ids)
  if traits_of(advantage).of_batch:
    raise ValueError("the advantage is over the whole batch, not over groups: leave group_ids out")
  rewards, where = samples(rewards, where)
  remedy = "number the groups, np.unique(group_ids, return_inverse=True)[1]"
  group_ids = as_ids("group_ids", group_ids, remedy)
  check_same_shape(rewards=rewards, group_ids=group_ids)
  known = not is_unknown(group_ids)
  if traits_of(advantage).of_group and known and np.unique(group_ids).size == group_ids.size:
    raise ValueError(
      f"group_ids must name groups of at least 2; got {group_ids.size} groups of one, whose "
      f"advantage {describe(advantage)} is always 0: give the responses to one prompt the same id"
    )
  flat, ids, where = (whole(x).ravel() for x in (rewards, group_ids, where))
  slot: Any = as_data("advantage", advantage)
  of_samples = _compiled if is_ours(slot) else jax.jit(lambda *args: _of_samples(*args))
  return of_samples(slot, flat, ids, where).reshape(rewards.shape)


def _of_samples(slot: Partial, flat: jax.Array, ids: jax.Array, where: jax.Array) -> jax.Array:
  def of_sample(index: jax.Array) -> jax.Array:
    value = slot(flat, where & (ids == ids[index]))
    return check_returned("advantage", value, flat.shape, "sample")[index]

  # One pass over all samples for each: batches of them bound the memory to 64·N values.
  return jax.lax.map(of_sample, jnp.arange(flat.size), batch_size=min(64, flat.size))


_compiled = jax.jit(_of_samples)
