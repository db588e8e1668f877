"""Loops over chunks of tokens and tiles of the vocabulary: no `[tokens, vocab]` but one chunk's.

A chunk's logits are `[V, ..., C]`, the vocabulary first: a tile of them is one piece of memory, and
the unembedding's gradient, the one that is added up in memory, needs no transposed operand.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class TokenLogProbs(NamedTuple):
  """Log-probabilities of the sampled tokens and entropies of the policy, `[..., T]`, in nats."""

  log_probs: jax.Array
  entropy: jax.Array


class Slopes(NamedTuple):
  """The loss's derivatives with respect to `TokenLogProbs`; None for no entropy in the loss."""

  log_probs: jax.Array
  entropy: jax.Array | None


class Head(NamedTuple):
  """What makes logits of hidden states: softcap(h Wᵀ + b) / temperature."""

  unembedding: jax.Array
  bias: jax.Array | None
  softcap: jax.Array | None
  temperature: jax.Array


class Gradients(NamedTuple):
  """With respect to hidden states, unembedding and bias; None where not wanted."""

  hidden: jax.Array | None
  unembedding: jax.Array | None
  bias: jax.Array | None


class Tiling(NamedTuple):
  """How many tokens and how much vocabulary at a time; whether masked tokens are skipped."""

  chunk_size: int
  tile_size: int
  compact: bool


class _Chunks:
  """Takes arrays `[..., T, …]` chunk by chunk, and puts chunks back.

  A chunk is a slice of the token axis, so that the axes before it may be sharded; or, compact, the
  next tokens that count, wherever they are. Then masked tokens cost nothing, and how many chunks
  there are is known at run time only.
  """

  def __init__(self, mask: jax.Array, tiling: Tiling):
    """Counts the chunks and, for compact ones, finds the tokens of each."""
    self.mask, self.axis, self.compact = mask, mask.ndim - 1, tiling.compact
    rows = 1 if tiling.compact else mask.size // mask.shape[-1]
    self.length = mask.size // rows
    self.size = max(1, min(self.length, tiling.chunk_size // rows))
    self.count = -(-self.length // self.size)
    if self.compact:
      counts = self._flat(mask)
      rank = jnp.cumsum(counts, dtype=jnp.int32) - 1
      order = jnp.full(self.count * self.size, self.length)
      index = jnp.where(counts, rank, order.size)
      self.order = order.at[index].set(jnp.arange(self.length), mode="drop")
      self.count = -(-jnp.sum(counts.astype(jnp.int32)) // self.size)

  def _start(self, i: Any) -> jax.Array:
    return jnp.minimum(i * self.size, self.length - self.size)

  def _tokens(self, i: Any) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(self.order, i * self.size, self.size)

  def _flat(self, x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[self.axis + 1 :])

  def take(self, x: jax.Array, i: Any) -> jax.Array:
    """Takes chunk i of x, `[..., C, …]`."""
    if not self.compact:
      return jax.lax.dynamic_slice_in_dim(x, self._start(i), self.size, self.axis)
    return self._flat(x).at[self._tokens(i)].get(mode="fill", fill_value=0)

  def active(self, i: Any) -> jax.Array:
    """Marks the tokens of chunk i that count and were in no chunk before."""
    if self.compact:
      return self._tokens(i) < self.length
    fresh = self._start(i) + jnp.arange(self.size) >= i * self.size
    return self.take(self.mask, i) & jnp.expand_dims(fresh, range(self.axis))

  def add(self, totals: Any, chunks: Any, i: Any) -> Any:
    """Adds chunks i, 0 at tokens that are not active, to their places, which still hold 0."""

    def add(total: jax.Array, x: jax.Array) -> jax.Array:
      x = x.astype(total.dtype)
      if self.compact:
        return self._flat(total).at[self._tokens(i)].set(x, mode="drop").reshape(total.shape)
      x += self.take(total, i)
      return jax.lax.dynamic_update_slice_in_dim(total, x, self._start(i), self.axis)

    return jax.tree.map(add, totals, chunks)


def _over_tiles(vocabulary: int, size: int, step: Callable, carry: Any) -> Any:
  """Calls `step(start, size, carry)` for every tile, the last of which may be smaller."""
  whole, rest = divmod(vocabulary, size)
  if whole > 1:
    carry = jax.lax.fori_loop(0, whole, lambda i, carry: step(i * size, size, carry), carry)
  else:
    carry = step(0, size, carry)
  return step(whole * size, rest, carry) if rest else carry


def _cut(x: jax.Array, start: Any, size: int) -> jax.Array:
  if x.shape[0] == size:  # A slice of a sharded axis would gather it.
    return x
  return jax.lax.dynamic_slice_in_dim(x, start, size)


def _paste(x: jax.Array, tile: jax.Array, start: Any) -> jax.Array:
  if x.shape == tile.shape:
    return tile
  return jax.lax.dynamic_update_slice_in_dim(x, tile, start, 0)


def is_explicit(x: jax.Array) -> bool:
  """Tells whether an array lives on a mesh whose axes' shardings are part of its type."""
  kinds = jax.typeof(x).sharding.mesh.axis_types
  return any(kind == jax.sharding.AxisType.Explicit for kind in kinds)


def wider(a: Any, b: Any) -> Any:
  """Gives the dtype that holds what both hold; JAX's own promotion may be set to refuse."""
  try:
    return np.promote_types(a, b)
  except TypeError:  # neither of bfloat16 and float16 holds the other
    return jnp.float32


def accumulator(*dtypes: Any) -> Any:
  """Gives the dtype to add up in: the widest, float32 at least."""
  return functools.reduce(wider, dtypes, jnp.float32)


def _dot(subscripts: str, a: jax.Array, b: jax.Array, like: jax.Array | None = None) -> jax.Array:
  """Multiplies in the wider input dtype and adds up in float32 at least, sharded as `like` is."""
  dtype = wider(a.dtype, b.dtype)
  if jax.default_backend() == "cpu":  # which has no narrow products, and before JAX 0.9 says so
    dtype = accumulator(dtype)
  return jnp.einsum(
    subscripts,
    a.astype(dtype),
    b.astype(dtype),
    preferred_element_type=accumulator(dtype),
    out_sharding=None if like is None or not is_explicit(like) else jax.typeof(like).sharding,
  )


def all_logits(hidden: jax.Array, head: Head) -> jax.Array:
  """Forms the logits, `[..., V]`."""
  products = _dot("...h,vh->...v", hidden, head.unembedding)
  return _of_products(products, head.bias, range(products.ndim - 1), head)


def _logits(hidden: jax.Array, head: Head, start: Any, size: int) -> jax.Array:
  products = _dot("vh,...h->v...", _cut(head.unembedding, start, size), hidden)
  bias = None if head.bias is None else _cut(head.bias, start, size)
  return _of_products(products, bias, range(1, products.ndim), head)


def _of_products(
  logits: jax.Array, bias: jax.Array | None, token_axes: Sequence[int], head: Head
) -> jax.Array:
  """Makes logits of h Wᵀ; the bias has no token axes."""
  if bias is not None:
    logits += jnp.expand_dims(bias.astype(logits.dtype), token_axes)
  if head.softcap is not None:
    logits = head.softcap * jnp.tanh(logits / head.softcap)
  return logits / head.temperature


def _is_token(tokens: jax.Array, start: Any, size: int) -> jax.Array:
  return (tokens - start)[None] == jnp.expand_dims(jnp.arange(size), range(1, 1 + tokens.ndim))


class _Seen(NamedTuple):
  """Of the logits z of a token so far: m = max z, Σ e^(z−m), Σ (z−m) e^(z−m), and its own logit."""

  largest: jax.Array
  total: jax.Array
  excess: jax.Array
  target: jax.Array

  def add(self, logits: jax.Array, is_token: jax.Array) -> "_Seen":
    """Takes in a tile."""
    largest = jnp.maximum(self.largest, jnp.max(logits, axis=0))
    shrink = jnp.exp(self.largest - largest)
    x = logits - largest[None]
    power = jnp.exp(x)
    excess = jnp.sum(jnp.where(power > 0, x * power, 0), axis=0)  # −inf · 0 of a banned token
    return _Seen(
      largest,
      shrink * self.total + jnp.sum(power, axis=0),
      shrink * (self.excess + (self.largest - largest) * self.total) + excess,
      self.target + jnp.sum(jnp.where(is_token, logits, 0), axis=0),
    )

  def outputs(self) -> TokenLogProbs:
    """Gives what is known once every tile was seen."""
    entropy = jnp.log(self.total) - self.excess / self.total
    return TokenLogProbs(self.log_probs(self.target[None])[0], entropy)

  def log_probs(self, logits: jax.Array) -> jax.Array:
    """Gives log-probabilities; in this order they keep their digits however large logits are."""
    return (logits - self.largest[None]) - jnp.log(self.total)[None]


def _look(
  hidden: jax.Array, tokens: jax.Array, head: Head, tile_size: int, buffer: jax.Array | None
) -> tuple[_Seen, jax.Array | None]:
  """Passes over the vocabulary; the logits stay in the buffer, if there is one."""
  vocabulary = head.unembedding.shape[0]

  def step(start: Any, size: int, carry: tuple) -> tuple:
    seen, buffer = carry
    logits = _logits(hidden, head, start, size)
    seen = seen.add(logits, _is_token(tokens, start, size))
    if size == vocabulary:
      return seen, logits
    return seen, None if buffer is None else _paste(buffer, logits, start)

  zero = jnp.zeros_like(tokens, head.temperature.dtype)
  target = jnp.where((tokens >= 0) & (tokens < vocabulary), zero, jnp.nan)
  seen = _Seen(zero + jnp.finfo(zero.dtype).min / 2, zero, zero, target)
  return _over_tiles(vocabulary, tile_size, step, (seen, buffer))


def _slope(
  logits: jax.Array, is_token: jax.Array, seen: _Seen, slopes: Slopes, head: Head
) -> jax.Array:
  """The loss's derivative with respect to h Wᵀ + b.

  Of a log-probability it is 1 − p at the token, −p elsewhere; of the entropy, −p (log p + H).
  """
  log_probs = seen.log_probs(logits)
  probs, slope = jnp.exp(log_probs), slopes.log_probs[None]
  share = slope
  if slopes.entropy is not None:
    surprise = jnp.where(probs > 0, log_probs, 0) + seen.outputs().entropy[None]
    share += slopes.entropy[None] * surprise
  slope = (jnp.where(is_token, slope, 0) - probs * share) / head.temperature
  if head.softcap is not None:
    slope *= 1 - (logits * head.temperature / head.softcap) ** 2
  return slope


def _accumulate(
  hidden: jax.Array, head: Head, tile_size: int, slope_of: Callable, gradients: Gradients
) -> Gradients:
  """Passes over the vocabulary again and adds a chunk's gradients to `gradients`, in place."""
  dtype = wider(hidden.dtype, head.unembedding.dtype)

  def step(start: Any, size: int, gradients: Gradients) -> Gradients:
    slope = slope_of(start, size)
    d_hidden, d_unembedding, d_bias = gradients
    if d_hidden is not None:
      rows = _cut(head.unembedding, start, size)
      d_hidden += _dot("v...,vh->...h", slope.astype(dtype), rows, d_hidden)
    if d_unembedding is not None:
      tile = _cut(d_unembedding, start, size)
      tile += _dot("v...,...h->vh", slope.astype(dtype), hidden, tile)
      d_unembedding = _paste(d_unembedding, tile, start)
    if d_bias is not None:
      tile = _cut(d_bias, start, size) + jnp.sum(slope, axis=range(1, slope.ndim))
      d_bias = _paste(d_bias, tile, start)
    return Gradients(d_hidden, d_unembedding, d_bias)

  return _over_tiles(head.unembedding.shape[0], tile_size, step, gradients)


def sweep(
  hidden: jax.Array,
  head: Head,
  tokens: jax.Array,
  mask: jax.Array,
  tiling: Tiling,
  slopes: Callable | None = None,
  wanted: Gradients | None = None,
) -> tuple[TokenLogProbs, Gradients]:
  """Computes log-probabilities and, given the loss's slopes in them, its gradients in one go.

  Args:
    hidden: h, `[..., T, H]`; masked rows may hold anything.
    head: W `[V, H]` and what else makes logits.
    tokens: the sampled tokens, `[..., T]`.
    mask: the tokens that count, `[..., T]` bools.
    tiling: how the work is cut.
    slopes: `(take, log_probs) -> Slopes` of a chunk, where `take` cuts an array `[..., T]` to that
      chunk; None for no gradients.
    wanted: zeros where a gradient is wanted, None elsewhere.

  Returns:
    `TokenLogProbs`, 0 at masked tokens, and `Gradients`.
  """
  chunks, dtype = _Chunks(mask, tiling), head.temperature.dtype
  zero = jnp.zeros_like(tokens, dtype)
  buffer, wanted = None, wanted or Gradients(None, None, None)
  if slopes is not None and tiling.tile_size < head.unembedding.shape[0]:
    row = jnp.zeros_like(chunks.take(tokens, 0), dtype)
    buffer = jnp.broadcast_to(row, (head.unembedding.shape[0], *row.shape))

  def of_chunk(i: jax.Array, carry: tuple) -> tuple:
    outputs, gradients, buffer = carry
    active = chunks.active(i)
    h = jnp.where(jnp.expand_dims(active, -1), chunks.take(hidden, i), 0)
    y = jnp.where(active, chunks.take(tokens, i), 0)
    seen, logits = _look(h, y, head, tiling.tile_size, buffer)
    own = jax.tree.map(lambda x: jnp.where(active, x, 0), seen.outputs())
    outputs = chunks.add(outputs, own, i)
    if slopes is None or logits is None:
      return outputs, gradients, buffer

    slope = slopes(lambda x: chunks.take(x, i), own)
    slope = jax.tree.map(lambda x: jnp.where(active, x, 0).astype(dtype), slope)

    def slope_of(start: Any, size: int) -> jax.Array:
      return _slope(_cut(logits, start, size), _is_token(y, start, size), seen, slope, head)

    rows = None if gradients.hidden is None else jnp.zeros_like(h, dtype)
    totals = _accumulate(h, head, tiling.tile_size, slope_of, gradients._replace(hidden=rows))
    rows = chunks.add(gradients.hidden, totals.hidden, i)
    return outputs, totals._replace(hidden=rows), None if buffer is None else logits

  _, carry = vary((tokens, (TokenLogProbs(zero, zero), wanted, buffer)))
  outputs, gradients, _ = jax.lax.fori_loop(0, chunks.count, of_chunk, carry)
  return outputs, gradients


def vary(tree: Any) -> Any:
  """Adds a 0 of all arrays of a tree to each, which compiles to nothing.

  Under `shard_map` all then vary over the devices over which any of them does, as a loop requires;
  and a gradient in a replicated array is summed over the devices, by JAX itself.
  """
  none = [jnp.sum((x != x).astype(jnp.int32) * 0) for x in jax.tree.leaves(tree)]
  zero = functools.reduce(jnp.add, none)
  return jax.tree.map(
    lambda x: x | zero.astype(bool) if x.dtype == bool else x + zero.astype(x.dtype), tree
  )
