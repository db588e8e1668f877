"""The forward pass over the vocabulary: log-probabilities and entropies of a chunk of tokens.

    log π_y = −log(1 + Σ_{v≠y} e^(z_v − z_y))

The sampled token's own logit is known before the others, from one row of W. Relative to it they
need no search for the largest first: one pass sums all, while the product's tiles are at hand, and
keeps for the backward pass the powers, which may be narrow, and not the logits, which may not. Only
if some token is too improbable for that does a second pass measure from the largest logit.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpo_jax.linear.head import Head, logits_of, over_tiles, wider
from gpo_jax.linear.mesh import Layout

_TOO_LARGE = 1e20  # for a token of log π < −46: slopes over it would be too small for float32
FAR = 1e9  # the reference of tokens that do not count, from which all powers are 0


class TokenLogProbs(NamedTuple):
  """Log-probabilities of the sampled tokens and entropies of the policy, `[..., T]`, in nats."""

  log_probs: jax.Array
  entropy: jax.Array


class Seen(NamedTuple):
  """Sums over the vocabulary of a chunk's logits z, relative to a reference r per token, `[C]`.

  Attributes:
    reference: r, the own logit z_y, or the largest.
    gap: z_y − r.
    others: Σ_{v≠y} e^(z_v − r).
    excess: Σ_{v≠y} (z_v − r) e^(z_v − r).
  """

  reference: jax.Array
  gap: jax.Array
  others: jax.Array
  excess: jax.Array

  @property
  def total(self) -> jax.Array:
    """Returns Σ_v e^(z_v − r)."""
    return self.others + jnp.exp(self.gap)

  @property
  def log_total(self) -> jax.Array:
    """Returns its logarithm, with all its digits if others are improbable."""
    return jnp.log1p(self.others + jnp.expm1(self.gap))

  def outputs(self) -> TokenLogProbs:
    """Computes the results."""
    own = jnp.exp(self.gap)
    excess = self.excess + jnp.where(own > 0, self.gap * own, 0)  # −inf · 0 of a banned token
    return TokenLogProbs(self.gap - self.log_total, self.log_total - excess / self.total)


def is_token(tokens: jax.Array, start: Any, size: int) -> jax.Array:
  """Marks each token's own entry in a tile, `[size, C]`."""
  return (tokens - start)[None] == jnp.arange(size)[:, None]


def powers_dtype(hidden: jax.Array, head: Head, narrow: bool) -> Any:
  """Returns the dtype of e^(z − r): bfloat16 if products are; float16 could not hold them."""
  dtype = wider(hidden.dtype, head.unembedding.dtype)
  return dtype if narrow and dtype == jnp.bfloat16 else head.dtype


def look(
  hidden_of: Callable[[], jax.Array],
  head: Head,
  tokens: jax.Array,
  target: jax.Array,
  counts: jax.Array,
  layout: Layout,
  tile_size: int,
  narrow: bool,
  buffer: jax.Array | None,
) -> tuple[Seen, jax.Array | None]:
  """Passes over the vocabulary; powers e^(z − r), `[V, C]`, stay in the buffer, if there is one.

  Args:
    hidden_of: makes h, `[C, H]`: sliced where it is used, it need not be kept for a second pass.
    head: W `[V, H]` and what else makes logits, as this device holds it.
    tokens: the sampled tokens, `[C]`, relative to this device's part of the vocabulary.
    target: their own logits, `[C]`; −inf for an id outside of the vocabulary.
    counts: whether they count; the rest get powers of 0.
    layout: what other devices hold.
    tile_size: how many entries of the vocabulary at a time.
    narrow: whether products may be of a narrow dtype.
    buffer: None, or `[V, C]` to be written.
  """
  vocabulary, zero = head.unembedding.shape[0], jnp.zeros_like(tokens, head.dtype)

  def add_up(hidden: jax.Array, reference: jax.Array, powers: jax.Array | None) -> tuple:
    reference = jnp.where(counts, reference, FAR)

    def step(start: Any, size: int, carry: tuple) -> tuple:
      others, excess, powers = carry
      x = logits_of(hidden, head, start, size, narrow) - reference[None]
      power = jnp.where(is_token(tokens, start, size), 0, jnp.exp(x))
      others += jnp.sum(power, axis=0)
      excess += jnp.sum(jnp.where(power > 0, x * power, 0), axis=0)
      if powers is not None:
        kept = power.astype(powers.dtype)
        whole = size == vocabulary
        powers = kept if whole else jax.lax.dynamic_update_slice_in_dim(powers, kept, start, 0)
      return others, excess, powers

    others, excess, powers = over_tiles(vocabulary, tile_size, step, (zero, zero, powers))
    others, excess = layout.over_vocabulary((others, excess))
    gap = jnp.where(counts, target - reference, 0)
    return Seen(reference, gap, others, excess), powers

  def again(carry: tuple) -> tuple:
    hidden = hidden_of()

    def step(start: Any, size: int, largest: jax.Array) -> jax.Array:
      logits = logits_of(hidden, head, start, size, narrow)
      return jnp.maximum(largest, jnp.max(logits, axis=0))

    largest = over_tiles(vocabulary, tile_size, step, zero + jnp.finfo(zero.dtype).min)
    if layout.of_vocabulary:
      largest = jax.lax.pmax(largest, layout.of_vocabulary)
    # The compiler must not keep the logits for the second pass: it would reserve their memory.
    largest, same_hidden = jax.lax.optimization_barrier((largest, hidden))
    return jnp.zeros_like(carry[0]), *add_up(same_hidden, largest, carry[2])

  seen, powers = add_up(hidden_of(), target, buffer)
  failed = jnp.any(counts & ~(seen.others + seen.excess < _TOO_LARGE))
  failed = layout.most(failed.astype(jnp.int32)) > 0
  with jax.named_scope("improbable_tokens"):
    _, seen, powers = jax.lax.while_loop(lambda carry: carry[0], again, (failed, seen, powers))
  return seen, powers
