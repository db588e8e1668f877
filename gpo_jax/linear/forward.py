"""The forward pass over the vocabulary: log-probabilities and entropies of a chunk of tokens."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpo_jax.linear.head import Head, logits_of, over_tiles


class TokenLogProbs(NamedTuple):
  """Log-probabilities of the sampled tokens and entropies of the policy, `[..., T]`, in nats."""

  log_probs: jax.Array
  entropy: jax.Array


class Seen(NamedTuple):
  """The logits z of each token so far: m = max z, Σ e^(z−m), Σ (z−m) e^(z−m), and its own logit."""

  largest: jax.Array
  total: jax.Array
  excess: jax.Array
  target: jax.Array

  def add(self, logits: jax.Array, is_token: jax.Array) -> "Seen":
    """Adds a tile of logits, `[size, C]`."""
    largest = jnp.maximum(self.largest, jnp.max(logits, axis=0))
    x = logits - largest[None]
    power = jnp.exp(x)
    tile = Seen(
      largest,
      jnp.sum(power, axis=0),
      jnp.sum(jnp.where(power > 0, x * power, 0), axis=0),  # −inf · 0 of a banned token
      jnp.sum(jnp.where(is_token, logits, 0), axis=0),
    )
    return Seen(*(a + b for a, b in zip(self.relative_to(largest), tile, strict=True)))._replace(
      largest=largest
    )

  def relative_to(self, largest: jax.Array) -> "Seen":
    """Changes m."""
    gap = self.largest - largest
    shrink = jnp.exp(gap)
    excess = shrink * (self.excess + gap * self.total)
    return Seen(largest, shrink * self.total, excess, self.target)

  def combine(self, axes: tuple[str, ...]) -> "Seen":
    """Combines what the devices along these axes of a mesh have seen of the vocabulary."""
    if not axes:
      return self
    largest = jax.lax.pmax(self.largest, axes)
    total, excess, target = jax.lax.psum(self.relative_to(largest)[1:], axes)
    return Seen(largest, total, excess, target)

  def outputs(self) -> TokenLogProbs:
    """Computes the results, once every tile was seen."""
    entropy = jnp.log(self.total) - self.excess / self.total
    return TokenLogProbs(self.log_probs(self.target[None])[0], entropy)

  def log_probs(self, logits: jax.Array) -> jax.Array:
    """Computes log-probabilities; in this order they keep their digits however large logits are."""
    return (logits - self.largest[None]) - jnp.log(self.total)[None]


def is_token(tokens: jax.Array, start: Any, size: int) -> jax.Array:
  """Marks each token's own entry in a tile, `[size, C]`."""
  return (tokens - start)[None] == jnp.arange(size)[:, None]


def look(
  hidden: jax.Array,
  head: Head,
  tokens: jax.Array,
  known: jax.Array,
  tile_size: int,
  narrow: bool,
  buffer: jax.Array | None,
) -> tuple[Seen, jax.Array | None]:
  """Passes over the vocabulary; the logits, `[V, C]`, stay in the buffer, if there is one.

  A token that is not `known` to the vocabulary gets NaN.
  """
  vocabulary = head.unembedding.shape[0]

  def step(start: Any, size: int, carry: tuple) -> tuple:
    seen, buffer = carry
    logits = logits_of(hidden, head, start, size, narrow)
    seen = seen.add(logits, is_token(tokens, start, size))
    if size == vocabulary:
      return seen, logits
    if buffer is not None:
      buffer = jax.lax.dynamic_update_slice_in_dim(buffer, logits, start, 0)
    return seen, buffer

  zero = jnp.zeros_like(tokens, head.dtype)
  target = jnp.where(known, zero, jnp.nan)
  seen = Seen(zero + jnp.finfo(zero.dtype).min / 2, zero, zero, target)
  return over_tiles(vocabulary, tile_size, step, (seen, buffer))
