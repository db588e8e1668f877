"""The backward pass over the vocabulary: gradients of a chunk, given the loss's slopes.

Slopes are split into a power of two per token and the rest: float16 holds the rest however small or
large the loss's scale is. Gradients stay in float32 at least: the caller scales, then casts.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpo_jax.linear.forward import Seen, is_token
from gpo_jax.linear.head import Head, dot, over_tiles, rows_of, wider


class Slopes(NamedTuple):
  """The loss's derivatives in `TokenLogProbs`, `[C]`; None if the loss has no entropy in it."""

  log_probs: jax.Array
  entropy: jax.Array | None


class Gradients(NamedTuple):
  """The loss's derivatives in hidden states, unembedding and bias, float32 at least."""

  hidden: jax.Array
  unembedding: jax.Array
  bias: jax.Array | None


def zero_gradients(hidden: jax.Array, head: Head) -> Gradients:
  """Makes gradients to accumulate in."""
  dtype = head.dtype
  bias = None if head.bias is None else jnp.zeros_like(head.bias, dtype)
  return Gradients(jnp.zeros_like(hidden, dtype), jnp.zeros_like(head.unembedding, dtype), bias)


def _logit_slope(
  logits: jax.Array, own: jax.Array, seen: Seen, slopes: Slopes, head: Head
) -> jax.Array:
  """Computes the loss's derivative in h Wᵀ + b, times the temperature.

  Of a log-probability it is 1 − p at the token, −p elsewhere; of the entropy, −p (log p + H).
  """
  log_probs = seen.log_probs(logits)
  probs, share = jnp.exp(log_probs), slopes.log_probs[None]
  if slopes.entropy is not None:
    surprise = jnp.where(probs > 0, log_probs, 0) + seen.outputs().entropy[None]
    share = share + slopes.entropy[None] * surprise
  slope = jnp.where(own, slopes.log_probs[None], 0) - probs * share
  if head.softcap is not None:
    slope *= 1 - (logits * head.temperature / head.softcap) ** 2
  return slope


def accumulate(
  hidden: jax.Array,
  head: Head,
  tokens: jax.Array,
  seen: Seen,
  logits: jax.Array,
  slopes: Slopes,
  tile_size: int,
  narrow: bool,
  gradients: Gradients,
) -> Gradients:
  """Passes over the vocabulary and adds a chunk's gradients to those of the head, in place.

  Args:
    hidden: h, `[C, H]`.
    head: W `[V, H]` and what else makes logits.
    tokens: the sampled tokens, `[C]`.
    seen: from the forward pass.
    logits: from the forward pass, `[V, C]`.
    slopes: of the loss.
    tile_size: how many entries of the vocabulary at a time.
    narrow: whether products may be of a narrow dtype.
    gradients: of hidden zeros `[C, H]`; of the head what other chunks have added.

  Returns:
    The gradients: of hidden those of this chunk.
  """
  dtype = wider(hidden.dtype, head.unembedding.dtype) if narrow else gradients.hidden.dtype
  slopes = jax.tree.map(lambda x: x / head.temperature, slopes)
  size = functools.reduce(jnp.add, map(jnp.abs, jax.tree.leaves(slopes)))
  exponent = jnp.frexp(size)[1]
  slopes = jax.tree.map(lambda x: jnp.ldexp(x, -exponent), slopes)
  # dW mixes tokens: hidden states carry the powers of two, in float16 relative to the largest.
  # Scaling the product afterwards costs a pass over [V, H], so wider exponents do without.
  largest = jnp.max(exponent) if dtype == jnp.float16 else jnp.zeros_like(exponent[0])
  share = jnp.ldexp(jnp.ones_like(size), exponent - largest)
  shared = share[:, None].astype(dtype) * hidden.astype(dtype)
  of_tokens, of_head = (jnp.ldexp(jnp.ones((), size.dtype), x) for x in (exponent, largest))

  def step(start: Any, size: int, gradients: Gradients) -> Gradients:
    d_hidden, d_unembedding, d_bias = gradients
    own = is_token(tokens, start, size)
    slope = _logit_slope(rows_of(logits, start, size), own, seen, slopes, head)
    # Computed once, not again as a part of each product, which a TPU's compiler would prefer.
    narrowed = jax.lax.optimization_barrier(slope.astype(dtype))
    d_hidden += dot("vc,vh->ch", narrowed, rows_of(head.unembedding, start, size), narrow)
    tile = dot("vc,ch->vh", narrowed, shared, narrow)
    d_unembedding = _add_rows(d_unembedding, of_head * tile, start)
    if d_bias is not None:
      d_bias = _add_rows(d_bias, of_head * jnp.sum(slope * share[None], axis=1), start)
    return Gradients(d_hidden, d_unembedding, d_bias)

  gradients = over_tiles(head.unembedding.shape[0], tile_size, step, gradients)
  return gradients._replace(hidden=of_tokens[:, None] * gradients.hidden)


def _add_rows(x: jax.Array, rows: jax.Array, start: Any) -> jax.Array:
  rows = rows_of(x, start, rows.shape[0]) + rows
  if rows.shape == x.shape:
    return rows
  return jax.lax.dynamic_update_slice_in_dim(x, rows, start, 0)
