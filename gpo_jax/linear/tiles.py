"""The loop over tiles of the vocabulary, all tokens in each: the second of two passes.

A tile's part of the unembedding's gradient is finished before the next tile begins, so that no
`[V, H]` is accumulated: on one device it is written once, as it is returned.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

from gpo_jax._mesh import vary
from gpo_jax.linear.backward import Gradients, Slopes, accumulate, cast, zero_gradients
from gpo_jax.linear.chunks import (
  CHIP_TWICE,
  CPU,
  Tiling,
  by_platform,
  compact,
  each_chunk,
  pick,
  put,
  sizes,
)
from gpo_jax.linear.forward import FAR, Seen, is_token
from gpo_jax.linear.head import Head, logits_of, over_tiles, rows_of
from gpo_jax.linear.mesh import Layout

# Memory to be written. JAX's own would be batched under vmap, and summed as if it were a gradient.
_unwritten = Primitive("unwritten")
_unwritten.def_abstract_eval(lambda **of: jax.core.ShapedArray(**of))


@_unwritten.def_impl
def _memory(*, shape: tuple[int, ...], dtype: Any, **_: Any) -> jax.Array:
  return jax.lax.empty(shape, dtype)


mlir.register_lowering(_unwritten, mlir.lower_fun(_memory, multiple_results=False))


def gradients_of(
  tiling: Tiling,
  layout: Layout,
  hidden: jax.Array,
  head: Head,
  tokens: jax.Array,
  mask: jax.Array,
  seen: Seen,
  slopes: Slopes,
) -> Gradients:
  """Computes gradients, given what a first pass has seen of each token, and the loss's slopes.

  Arguments are those of `over_chunks`; seen and slopes are `[N]`. The unembedding's gradient is in
  its dtype if nothing is to be added.
  """
  head = layout.gather(head)
  arguments = (hidden, head, layout.own_tokens(tokens, head)[0], mask, seen, slopes)
  gradients = by_platform(functools.partial(_gradients_of, tiling, layout), *arguments)
  return layout.reduce(gradients, summed=_at_once(tiling, layout))


def _at_once(tiling: Tiling, layout: Layout) -> bool:
  """Tells whether a tile's part of the unembedding's gradient is summed over devices at once."""
  return not layout.gathered[0] and (tiling.recompute or not layout.of_tokens)


def _gradients_of(tiling, layout, chip, hidden, head, tokens, mask, seen, slopes):
  vocabulary, default = head.unembedding.shape[0], CHIP_TWICE if chip else CPU
  chunk, tile = sizes(tiling, default, tokens.size, vocabulary)
  order, rank, active = compact(mask, chunk)
  h, y, seen, slopes = pick((hidden, tokens, seen, slopes), order)
  # What fills the last chunk has no powers.
  counts = jnp.arange(y.size, dtype=jnp.int32) < active
  seen = seen._replace(reference=jnp.where(counts, seen.reference, FAR))
  at_once = _at_once(tiling, layout)
  sum_up = layout.sum_up if at_once else lambda x: x

  def add_tile(start: Any, size: int, gradients: Gradients) -> Gradients:
    rows = head.unembedding, head.bias
    unembedding, bias = jax.tree.map(lambda x: rows_of(x, start, size), rows)
    part = head._replace(unembedding=unembedding, bias=bias)

    def add_chunk(length: int, at: jax.Array, carry: tuple) -> tuple:
      sums, _ = carry
      take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=at, slice_size=length)
      own_h, own_y, own, slope = jax.tree.map(take, (h, y - start, seen, slopes))
      powers = jnp.exp(logits_of(own_h, part, 0, size, chip) - own.reference[None])
      powers = jnp.where(is_token(own_y, 0, size), 0, powers)
      empty = sums._replace(hidden=jnp.zeros_like(own_h, head.dtype))
      added = accumulate(own_h, part, own_y, own, powers, slope, size, chip, empty)
      d_hidden = put(sums.hidden, take(sums.hidden) + added.hidden, at)
      return added._replace(hidden=d_hidden), None

    sums = vary((y, zero_gradients(h, part)))[1]._replace(hidden=gradients.hidden)
    first = sums._replace(unembedding=None) if chip and chunk < y.size else None
    with jax.named_scope("tiles"):
      sums = each_chunk(chunk, active, add_chunk, sums, first=first)
    found = cast(sum_up(sums.unembedding), gradients.unembedding.dtype), sums.bias
    whole = gradients.unembedding, gradients.bias
    return Gradients(sums.hidden, *jax.tree.map(lambda x, y: put(x, y, start), whole, found))

  gradients = zero_gradients(h, head)
  # CPUs widen all of a narrow array to write a part of it.
  dtype = head.unembedding.dtype if at_once else head.dtype
  shape = jax.eval_shape(sum_up, gradients.unembedding).shape
  unwritten = _unwritten.bind(
    shape=shape,
    dtype=jnp.dtype(dtype if chip else head.dtype),
    sharding=jax.typeof(gradients.unembedding).sharding,
  )
  gradients = vary((y, gradients._replace(unembedding=unwritten)))[1]
  d_hidden, unembedding, bias = over_tiles(vocabulary, tile, add_tile, gradients)
  return Gradients(pick(d_hidden, rank), unembedding.astype(dtype), bias)
