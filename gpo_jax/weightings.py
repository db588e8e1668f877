"""Weightings: each token's share of the loss, as data.

Each is `(mask, segment_ids=None, *, …) -> weights`, `[..., T]` to `[..., T]`: computed once over
the data of one optimizer step, so that the loss is a plain sum however the batch is sliced
afterwards. A masked token weighs 0, a fully masked response is not counted, and a batch without a
token weighs 0 everywhere. `mask` holds bools or 0/1; `segment_ids` tells the responses of packed
rows apart, one response per row if None.
"""

import chex
import jax
import jax.numpy as jnp

from gpo_jax import _segments
from gpo_jax._inputs import as_filled_ids, as_mask, as_scalar
from gpo_jax.traits import slot_function


def _active(mask: jax.Array, segment_ids: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
  mask = as_mask("mask", mask)
  active = mask.astype(jax.dtypes.canonicalize_dtype(float))
  return active, as_filled_ids(segment_ids, mask)


@slot_function(by_length=True, denominator="tokens")
def token_mean(mask: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
  """Gives every token of the batch the same weight.

      w_t = 1 / (number of active tokens in the batch)

  Returns:
    Weights that sum to 1, `[..., T]`.

  Example:
    >>> print(token_mean(jnp.array([[1, 1, 0], [1, 1, 0]])))
    [[0.25 0.25 0.  ]
     [0.25 0.25 0.  ]]

  Reference: Yu et al. (2025, DAPO), arXiv:2503.14476, Eq. 8.
  """
  active, _ = _active(mask, segment_ids)
  return active / jnp.maximum(jnp.sum(active), 1)


@slot_function(denominator="responses")
def sequence_mean(mask: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
  """Gives every response the same weight, shared equally by its tokens.

      w_t = 1 / (L · number of responses)

  Returns:
    Weights that sum to 1, `[..., T]`.

  Example:
    >>> print(sequence_mean(jnp.array([[1, 1], [1, 0]])))
    [[0.25 0.25]
     [0.5  0.  ]]

  Reference: Shao et al. (2024, GRPO), arXiv:2402.03300, Eq. 3. TRL, verl's trainer, EasyDeL and
  MaxText count fully masked responses; ours, like Tunix, does not.
  """
  active, segment_ids = _active(mask, segment_ids)
  lengths = jnp.maximum(_segments.total(active, segment_ids), 1)
  return active / lengths / jnp.maximum(_segments.count(active, segment_ids), 1)


@slot_function(denominator="responses")
def sequence_sum(mask: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
  """Sums each response's tokens and averages the responses.

      w_t = 1 / (number of responses)

  Returns:
    Weights, `[..., T]`.

  Example:
    >>> print(sequence_sum(jnp.array([[1, 1], [1, 0]])))
    [[0.5 0.5]
     [0.5 0. ]]

  Reference: Ahmadian et al. (2024, RLOO), arXiv:2402.14740; with the sequence ratio, LUSPO (2026),
  arXiv:2602.05261.
  """
  active, segment_ids = _active(mask, segment_ids)
  return active / jnp.maximum(_segments.count(active, segment_ids), 1)


@slot_function(by_length=True, denominator="responses")
def constant_length(
  mask: jax.Array, segment_ids: jax.Array | None = None, *, length: chex.Numeric
) -> jax.Array:
  """Divides every response by one constant length, whatever its own length.

      w_t = 1 / (length · number of responses)

  Args:
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
  return sequence_sum(mask, segment_ids) / as_scalar("length", length)


@slot_function(by_length=True)
def token_sum(mask: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
  """Gives every token the weight 1: a plain sum.

      w_t = 1

  Returns:
    Weights, `[..., T]`.

  Example:
    >>> print(token_sum(jnp.array([1, 1, 0])))
    [1. 1. 0.]
  """
  return _active(mask, segment_ids)[0]
