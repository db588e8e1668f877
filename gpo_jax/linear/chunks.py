"""The loop over chunks of the tokens that count: masked tokens cost nothing, wherever they are.

On accelerators the first of several chunks always runs, and writes the gradient that others add to.

Tokens are flat here, `[N]`. The active ones are gathered to the front once, so that the loop meets
contiguous chunks and ends when they end: a number of chunks that is known at run time only, and has
no reverse-mode derivative. `one_pass` and `two_passes` differentiate by hand.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpo_jax._inputs import as_size
from gpo_jax._mesh import vary
from gpo_jax.linear.backward import Gradients, accumulate, zero_gradients
from gpo_jax.linear.forward import Seen, TokenLogProbs, look, powers_dtype
from gpo_jax.linear.head import Head, own_products, scale_logits
from gpo_jax.linear.mesh import Layout

# Sizes of chunks and tiles: on a chip of one pass, and of two.
CPU, CHIP, CHIP_TWICE = (512, 1024), (2048, None), (2048, 8192)


class Tiling(NamedTuple):
  """How much is computed at a time; what is None is chosen for the platform that compiles.

  Attributes:
    chunk_size: tokens at a time, per device. One pass holds their powers e^z, 2·chunk_size·V bytes
      if W and h are bfloat16, else twice that. 512 on CPU, 2048 elsewhere.
    tile_size: entries of the vocabulary at a time. 1024 on CPU, where a tile stays in the cache;
      elsewhere V in one pass, 8192 in two.
    recompute: whether `linear_loss` takes two passes for objectives that need one only: four
      products for three, but no gradient of the unembedding is accumulated, 4·V·H bytes, except on
      CPU of a W in bfloat16. On a mesh each tile's part of it is then summed over devices at once,
      if W is not gathered over V.
  """

  chunk_size: int | None = None
  tile_size: int | None = None
  recompute: bool = False


def as_tiling(tiling: Tiling | None) -> Tiling:
  """Checks a tiling."""
  if not isinstance(tiling, Tiling | None):
    raise ValueError(
      f"tiling must be a Tiling; got {tiling!r:.60}: pass gpo.Tiling(chunk_size=1024)"
    )
  chunk_size, tile_size, recompute = tiling or Tiling()
  if not isinstance(recompute, bool):
    raise ValueError(f"recompute must be True or False; got {recompute!r:.60}")
  size = lambda name, x: None if x is None else as_size(name, x)  # noqa: E731
  return Tiling(size("chunk_size", chunk_size), size("tile_size", tile_size), recompute)


def over_chunks(
  tiling: Tiling,
  layout: Layout,
  hidden: jax.Array,
  head: Head,
  tokens: jax.Array,
  mask: jax.Array,
  slopes: Callable | None = None,
  per_token: Any = (),
) -> tuple[TokenLogProbs, Seen, Gradients | None]:
  """Computes log-probabilities and, given the loss's slopes in them, its gradients in one go.

  Args:
    tiling: how much at a time.
    layout: what other devices hold.
    hidden: h, `[N, H]`; masked rows may hold anything.
    head: W `[V, H]` and what else makes logits, as this device holds it.
    tokens: the sampled tokens, `[N]`.
    mask: the tokens that count, `[N]` bools.
    slopes: `(log_probs, per_token) -> Slopes` of a chunk; None for no gradients.
    per_token: arrays `[N]`; `slopes` gets the chunk's part of them.

  Returns:
    `TokenLogProbs`, 0 at masked tokens; what was seen of each token; and `Gradients`, of the shapes
    of hidden states and head.
  """
  head = layout.gather(head)
  arguments = (hidden, head, *layout.own_tokens(tokens, head), mask, per_token)
  run = functools.partial(_over_chunks, tiling, layout, slopes)
  outputs, seen, gradients = by_platform(run, *arguments)
  return outputs, seen, None if gradients is None else layout.reduce(gradients)


def _over_chunks(tiling, layout, slopes, chip, hidden, head, tokens, known, mask, per_token):
  default = CPU if not chip else CHIP if slopes else CHIP_TWICE
  chunk, tile = sizes(tiling, default, tokens.size, head.unembedding.shape[0])
  order, rank, active = compact(mask, chunk)
  h, y, known, fields = pick((hidden, tokens, known, per_token), order)
  # Of all tokens at once: in the loop a TPU's compiler would copy hidden states for its sake.
  own_logits = scale_logits(layout.over_vocabulary(own_products(h, head, y)), None, head)
  target = jnp.where(known, own_logits, -jnp.inf)
  chunks = _Chunks(h, head, y, known, target, fields, active, layout, slopes, tile, chip)
  seen, gradients = chunks.run(chunk)
  outputs = _outputs(seen, known)
  if gradients is not None:
    gradients = gradients._replace(hidden=pick(gradients.hidden, rank))
  return *pick((outputs, seen), rank), gradients


def by_platform(function: Callable, *arguments: Any) -> Any:
  """Calls `function(chip, …)` for the platform that is compiled for; another one may trace."""
  ways = {"cpu": functools.partial(function, False), "default": functools.partial(function, True)}
  return jax.lax.platform_dependent(*arguments, **ways)


def sizes(tiling: Tiling, default: tuple, length: int, vocabulary: int) -> tuple[int, int]:
  """Returns the sizes of chunks and tiles."""
  chunk, tile = tiling.chunk_size or default[0], tiling.tile_size or default[1] or vocabulary
  return min(chunk, length), min(tile, vocabulary)


def each_chunk(
  chunk: int, end: jax.Array, step: Callable, carry: Any, buffer: Any = None, first: Any = None
) -> Any:
  """Calls `step(size, start, (carry, buffer))` for chunks of the tokens up to the end.

  The last tokens go in smaller chunks, so that they do not cost a whole one. If first is given, the
  first chunk runs outside of the loops and starts from it: from no gradient of the unembedding,
  which that chunk then writes, and the others read and write.
  """
  start = jnp.zeros((), jnp.int32)
  if first is not None:
    carry, _ = step(chunk, start, (first, None))
    start += chunk
  sizes = (chunk, chunk // 4) if chunk % 4 == 0 and chunk >= 256 else (chunk,)
  for size in sizes:
    last = size == sizes[-1]
    # More than three of the last small chunks are one whole chunk.
    count = jnp.maximum(end - start + (size - 1 if last else size // 4 - 1), 0) // size
    with jax.named_scope("last_chunks" if last else "chunks"):
      carry, _ = jax.lax.fori_loop(
        0,
        count,
        lambda i, carry, size=size, start=start: step(size, start + i * size, carry),
        (carry, None if buffer is None else buffer(size)),
      )
    start += count * size
  return carry


class _Chunks(NamedTuple):
  """The active tokens, in front, and what is done with a chunk of them."""

  hidden: jax.Array
  head: Head
  tokens: jax.Array
  known: jax.Array
  target: jax.Array
  per_token: Any
  active: jax.Array
  layout: Layout
  slopes: Callable | None
  tile: int
  chip: bool

  @property
  def whole(self) -> bool:
    """Tells whether the vocabulary is one tile."""
    return self.tile == self.head.unembedding.shape[0]

  def run(self, chunk: int) -> tuple[Seen, Gradients | None]:
    """Takes one chunk after another."""
    zero = jnp.zeros_like(self.tokens, self.head.dtype)
    gradients = None if self.slopes is None else zero_gradients(self.hidden, self.head)
    carry = vary((self.tokens, (Seen(zero, zero, zero, zero), gradients)))[1]
    first = None
    if self.chip and chunk < self.tokens.size and self.whole and gradients is not None:
      seen, gradients = carry
      first = seen, gradients._replace(unembedding=None)
    buffer = self.zeros if self.slopes and not self.whole else None
    return each_chunk(chunk, self.layout.most(self.active), self.step, carry, buffer, first)

  def step(self, size: int, start: jax.Array, carry: tuple) -> tuple:
    """Adds a chunk's results and gradients to those of others."""
    (seen, gradients), buffer = carry
    take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
    h, y = take(self.hidden), take(self.tokens)
    counts = start + jnp.arange(size, dtype=jnp.int32) < self.active
    powers = self.zeros(size) if self.slopes and self.whole else buffer
    own, powers = look(
      lambda: take(self.hidden),
      self.head,
      y,
      take(self.target),
      counts,
      self.layout,
      self.tile,
      self.chip,
      powers,
    )
    seen = jax.tree.map(lambda x, y: put(x, y, start), seen, own)
    if self.slopes is None or powers is None:
      return (seen, gradients), buffer
    log_probs = jnp.where(counts, _outputs(own, take(self.known)).log_probs, 0)
    slope = self.slopes(log_probs, jax.tree.map(take, self.per_token))
    slope = jax.tree.map(lambda x: jnp.where(counts, x, 0).astype(self.head.dtype), slope)
    empty = gradients._replace(hidden=jnp.zeros_like(h, self.head.dtype))
    added = accumulate(h, self.head, y, own, powers, slope, self.tile, self.chip, empty)
    added = added._replace(hidden=put(gradients.hidden, added.hidden, start))
    return (seen, added), None if buffer is None else powers

  def zeros(self, size: int) -> jax.Array:
    """Makes a buffer for the powers of a chunk."""
    # That the compiler cannot foresee: it must not hold the buffers of several loops at once.
    zero = jnp.where(self.tokens[0] == jnp.iinfo(self.tokens.dtype).max, 1, 0)
    zero = zero.astype(powers_dtype(self.hidden, self.head, self.chip))
    return jnp.broadcast_to(zero, (self.head.unembedding.shape[0], size))


def _outputs(seen: Seen, known: jax.Array) -> TokenLogProbs:
  """Computes the results, NaN for tokens outside of the vocabulary."""
  outputs = seen.outputs()
  return outputs._replace(log_probs=jnp.where(known, outputs.log_probs, jnp.nan))


def compact(mask: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Finds the active tokens in order, each token's place among them, and how many they are.

  A place past the end of what is indexed marks no token: it reads 0.
  """
  length = mask.size
  padded = -(-length // chunk) * chunk
  order = jnp.flatnonzero(mask, size=padded, fill_value=length).astype(jnp.int32)
  rank = jnp.cumsum(mask.astype(jnp.int32)) - 1
  return order, jnp.where(mask, rank, padded), jnp.sum(mask, dtype=jnp.int32)


def pick(tree: Any, places: jax.Array) -> Any:
  """Takes rows at places; past the end they are 0."""
  return jax.tree.map(lambda x: x.at[places].get(mode="fill", fill_value=0), tree)


def put(x: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
  """Writes rows, in the dtype of what they are written to."""
  rows = rows.astype(x.dtype)
  return jax.lax.dynamic_update_slice_in_dim(x, rows, start, 0)
