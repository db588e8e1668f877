"""Weightings: each token's share of the loss, as data.

Each is `(mask, segment_ids=None, *, …) -> weights`, `[..., T]` to `[..., T]`: computed once over
all that one optimizer step sees, so that the loss is a plain sum however the batch is cut
afterwards. A masked token weighs 0; an empty row is not counted; a batch without a token weighs 0
everywhere.
"""

import chex
import jax
import jax.numpy as jnp

from gpo_jax import _checks, _segments


def _inputs(mask: jax.Array, segment_ids: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
  mask = _checks.as_mask("mask", mask)
  if segment_ids is not None:
    segment_ids = _checks.as_segment_ids(segment_ids, mask)
  return mask.astype(jax.dtypes.canonicalize_dtype(float)), segment_ids


def token_mean(mask: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
  """Gives every token of the batch the same weight.

      w_t = 1 / (number of active tokens in the batch)

  Args:
    mask: the tokens that count, `[..., T]`, bool or 0/1.
    segment_ids: not used.

  Returns:
    Weights that sum to 1, `[..., T]`.

  Example:
    >>> print(token_mean(jnp.array([[1, 1, 0], [1, 1, 0]])))
    [[0.25 0.25 0.  ]
     [0.25 0.25 0.  ]]

  Reference: Yu et al. (2025, DAPO), arXiv:2503.14476, Eq. 8.
  """
  active, _ = _inputs(mask, segment_ids)
  return active / jnp.maximum(jnp.sum(active), 1)


def sequence_mean(mask: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
  """Gives every response the same weight, shared equally by its tokens.

      w_t = 1 / (L · number of responses that are not empty)

  Args:
    mask: the tokens that count, `[..., T]`, bool or 0/1.
    segment_ids: the responses of packed rows, `[..., T]`; one response per row if None.

  Returns:
    Weights that sum to 1, `[..., T]`.

  Example:
    >>> print(sequence_mean(jnp.array([[1, 1], [1, 0]])))
    [[0.25 0.25]
     [0.5  0.  ]]

  Reference: Shao et al. (2024, GRPO), arXiv:2402.03300, Eq. 3. TRL, verl's trainer, EasyDeL and
  MaxText count empty responses; here, as in Tunix, they are not counted.
  """
  active, segment_ids = _inputs(mask, segment_ids)
  lengths = jnp.maximum(_segments.total(active, segment_ids), 1)
  return active / lengths / jnp.maximum(_segments.count(active, segment_ids), 1)


def sequence_sum(mask: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
  """Sums each response's tokens and averages the responses.

      w_t = 1 / (number of responses that are not empty)

  Args:
    mask: the tokens that count, `[..., T]`, bool or 0/1.
    segment_ids: the responses of packed rows, `[..., T]`; one response per row if None.

  Returns:
    Weights, `[..., T]`.

  Example:
    >>> print(sequence_sum(jnp.array([[1, 1], [1, 0]])))
    [[0.5 0.5]
     [0.5 0. ]]

  Reference: Ahmadian et al. (2024, RLOO), arXiv:2402.14740; with the sequence ratio, LUSPO (2026),
  arXiv:2602.05261.
  """
  active, segment_ids = _inputs(mask, segment_ids)
  return active / jnp.maximum(_segments.count(active, segment_ids), 1)


def constant_length(
  mask: jax.Array, segment_ids: jax.Array | None = None, *, length: chex.Numeric
) -> jax.Array:
  """Divides every response by one constant length, whatever its own.

      w_t = 1 / (length · number of responses that are not empty)

  Args:
    mask: the tokens that count, `[..., T]`, bool or 0/1.
    segment_ids: the responses of packed rows, `[..., T]`; one response per row if None.
    length: a number > 0 that does not depend on the batch, such as the longest allowed response.
      Never the padded width: padding further would shrink the loss.

  Returns:
    Weights, `[..., T]`.

  Example:
    >>> print(constant_length(jnp.array([[1, 1], [1, 0]]), length=4))
    [[0.125 0.125]
     [0.125 0.   ]]

  Reference: Liu et al. (2025, Dr. GRPO), arXiv:2503.20783.
  """
  return sequence_sum(mask, segment_ids) / _checks.as_scalar("length", length)


def token_sum(mask: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
  """Gives every token the weight 1: a plain sum.

      w_t = 1

  Args:
    mask: the tokens that count, `[..., T]`, bool or 0/1.
    segment_ids: not used.

  Returns:
    Weights, `[..., T]`.

  Example:
    >>> print(token_sum(jnp.array([1, 1, 0])))
    [1. 1. 0.]
  """
  return _inputs(mask, segment_ids)[0]
