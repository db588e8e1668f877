"""Advantages of tokens, from the values that a critic predicts."""

import chex
import jax
import jax.numpy as jnp

from gpo_jax._inputs import (
  as_array,
  as_filled_ids,
  as_mask,
  as_number_in_range,
  check_same_shape,
  promote,
)
from gpo_jax._mesh import vary


def generalized(
  rewards: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  segment_ids: jax.Array | None = None,
  *,
  discount: chex.Numeric = 1.0,
  decay: chex.Numeric = 0.95,
) -> jax.Array:
  """Estimates advantages of tokens from rewards and a critic's values (GAE).

      δ_t = r_t + γ V_t' − V_t,   A_t = δ_t + γλ A_t'

  t' is the response's next token that counts; after its last one V and A are 0. So masked tokens,
  such as a tool's, are skipped: they cost no factor γλ, and what they hold is invisible, rewards
  too. Give a reward to the token that earned it, usually the last of a response or turn. A critic
  is trained towards `advantages + values`. For discounted returns of rewards alone let the values
  be 0 and the decay 1.

  Args:
    rewards: r, `[..., T]`, of tokens.
    values: V, `[..., T]`, predicted before each token.
    mask: the tokens that count, `[..., T]`, bool or 0/1.
    segment_ids: of packed rows, as in `Objective.prepare`.
    discount: γ.
    decay: λ; 1 for returns minus values, 0 for δ.

  Returns:
    A, `[..., T]`, for `prepare(advantages=…)`; 0 at masked tokens, without gradient.

  Raises:
    ValueError: if shapes differ.

  Example:
    >>> rewards, mask = jnp.array([0.0, 0.0, 0.0, 0.0, 2.0]), jnp.array([1, 1, 0, 0, 1])
    >>> print(generalized(rewards, 0 * rewards, mask, discount=0.5, decay=1.0))
    [0.5 1.  0.  0.  2. ]

  Reference: Schulman et al. (2016), arXiv:1506.02438, Eq. 16.
  """
  mask = as_mask("mask", mask)
  given = {"rewards": as_array("rewards", rewards), "values": as_array("values", values)}
  check_same_shape(mask=mask, **given)
  clean = (jnp.where(mask, x, 0) for x in promote(*given.values()))
  rewards, values = jax.lax.stop_gradient(tuple(clean))
  discount = as_number_in_range("discount", discount, rewards.dtype)
  decay = as_number_in_range("decay", decay, rewards.dtype)
  last = jnp.zeros_like(mask)
  ids = as_filled_ids(segment_ids, mask)
  if ids is not None:
    last = last.at[..., :-1].set(ids[..., 1:] != ids[..., :-1])

  def step(later: tuple, token: tuple) -> tuple[tuple, jax.Array]:
    reward, value, counts, last = token
    advantage, next_value = (jnp.where(last, 0, x) for x in later)
    own = reward + discount * (next_value + decay * advantage) - value
    later = jnp.where(counts, own, advantage), jnp.where(counts, value, next_value)
    return later, jnp.where(counts, own, 0)

  discount, decay, *tokens = vary((discount, decay, rewards, values, mask, last))
  tokens = tuple(jnp.moveaxis(x, -1, 0) for x in tokens)
  end = jnp.zeros_like(tokens[0][0])
  _, advantages = jax.lax.scan(step, (end, end), tokens, reverse=True)
  return jnp.moveaxis(advantages, 0, -1)
