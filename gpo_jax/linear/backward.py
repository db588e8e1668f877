"""The backward pass over the vocabulary: gradients of a chunk, given the loss's slopes.

For float16, slopes are split into a power of two per token and the rest, which it holds however
small or large the loss's scale is. Gradients stay in float32 at least: the caller scales, then
casts.
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


def cast(x: jax.Array, dtype: Any) -> jax.Array:
  """Casts a gradient, by a factor that compilers cannot drop as 1.

  A TPU's casts faster so, and would else narrow what devices add instead of their sum.
  """
  if x.dtype == dtype:
    return x
  return (jax.lax.optimization_barrier(jnp.ones((), x.dtype)) * x).astype(dtype)


def _logit_slope(powers: jax.Array, own: jax.Array, seen: Seen, slopes: Slopes, head: Head):
  """Computes the loss's derivative in h Wᵀ + b, times the temperature.

  Of a log-probability it is 1 − p at the token, −p elsewhere; of the entropy, −p (log p + H).
  """
  log_probs, entropy = seen.outputs()
  at_token, share = slopes.log_probs * seen.others / seen.total, slopes.log_probs[None]
  powers = powers.astype(seen.total.dtype)
  relative = jnp.log(jnp.where(powers > 0, powers, 1))  # z − r
  if slopes.entropy is not None:
    prob = jnp.exp(log_probs)
    at_token -= slopes.entropy * prob * (jnp.where(prob > 0, log_probs, 0) + entropy)
    share = share + slopes.entropy[None] * (relative + (entropy - seen.log_total)[None])
  slope = -powers * (share / seen.total[None])
  if head.softcap is not None:
    bend = lambda logits: 1 - (logits * head.temperature / head.softcap) ** 2  # noqa: E731
    at_token *= bend(seen.gap + seen.reference)
    slope *= bend(relative + seen.reference[None])
  return jnp.where(own, at_token[None], slope)


def accumulate(
  hidden: jax.Array,
  head: Head,
  tokens: jax.Array,
  seen: Seen,
  powers: jax.Array,
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
    powers: from the forward pass, `[V, C]`.
    slopes: of the loss.
    tile_size: how many entries of the vocabulary at a time.
    narrow: whether products may be of a narrow dtype.
    gradients: of hidden zeros `[C, H]`; of the head what other chunks have added; of the
      unembedding None if none have, and the vocabulary is one tile.

  Returns:
    The gradients: of hidden those of this chunk.
  """
  dtype = wider(hidden.dtype, head.unembedding.dtype) if narrow else gradients.hidden.dtype
  slopes = jax.tree.map(lambda x: x / head.temperature, slopes)
  # A copy of its own, which a TPU keeps near: its compiler then finds better tiles for dW.
  shared, exponents = jax.lax.optimization_barrier(hidden.astype(dtype)), None
  if dtype == jnp.float16:
    slopes, exponents = _split(slopes)
    # dW mixes tokens: hidden states carry the powers of two, relative to the largest.
    shared *= jnp.ldexp(1.0, exponents - jnp.max(exponents))[:, None].astype(dtype)

  def step(start: Any, size: int, gradients: Gradients) -> Gradients:
    d_hidden, d_unembedding, d_bias = gradients
    own = is_token(tokens, start, size)
    slope = _logit_slope(rows_of(powers, start, size), own, seen, slopes, head)
    narrowed = slope.astype(dtype)
    d_hidden += dot("vc,vh->ch", narrowed, rows_of(head.unembedding, start, size), narrow)
    tile = dot("vc,ch->vh", narrowed, shared, narrow)
    if exponents is not None:
      tile, slope = jnp.ldexp(tile, jnp.max(exponents)), jnp.ldexp(slope, exponents[None])
    d_unembedding = _add_rows(d_unembedding, tile, start)
    if d_bias is not None:
      d_bias = _add_rows(d_bias, jnp.sum(slope, axis=1), start)
    return Gradients(d_hidden, d_unembedding, d_bias)

  gradients = over_tiles(head.unembedding.shape[0], tile_size, step, gradients)
  if exponents is None:
    return gradients
  return gradients._replace(hidden=jnp.ldexp(gradients.hidden, exponents[:, None]))


def _split(slopes: Slopes) -> tuple[Slopes, jax.Array]:
  """Splits slopes into numbers around 1 and the exponents of powers of two, `[C]`."""
  exponents = jnp.frexp(functools.reduce(jnp.add, map(jnp.abs, jax.tree.leaves(slopes))))[1]
  return jax.tree.map(lambda x: jnp.ldexp(x, -exponents), slopes), exponents


def _add_rows(x: jax.Array | None, rows: jax.Array, start: Any) -> jax.Array:
  if x is None:
    return rows
  rows = rows_of(x, start, rows.shape[0]) + rows
  if rows.shape == x.shape:
    return rows
  return jax.lax.dynamic_update_slice_in_dim(x, rows, start, 0)
