"""Two passes, for any objective: log-probabilities, then gradients, given the loss's slopes.

The backward pass recomputes the logits: four matrix products of tokens × V × H instead of three.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from gpo_jax.linear import tiles
from gpo_jax.linear.backward import Gradients, Slopes, cast
from gpo_jax.linear.chunks import Tiling, over_chunks
from gpo_jax.linear.derivatives import once
from gpo_jax.linear.forward import Seen, TokenLogProbs
from gpo_jax.linear.head import Head
from gpo_jax.linear.mesh import Layout


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def log_probs(
  tiling: Tiling,
  layout: Layout,
  hidden: jax.Array,
  head: Head,
  tokens: jax.Array,
  mask: jax.Array,
) -> TokenLogProbs:
  """Computes log-probabilities and entropies, differentiable in hidden states and head."""
  return on_devices(tiling, layout, hidden, head, tokens, mask)[0]


def _forward(tiling, layout, *arguments):
  arguments = jax.tree.map(lambda x: x.value, arguments)
  outputs, seen, _ = on_devices(tiling, layout, *arguments)
  return once(outputs), (*arguments, seen)


def _backward(tiling, layout, residuals, slopes):
  hidden, head, tokens, mask, seen = residuals
  own, entropy = (None if isinstance(x, SymbolicZero) else x for x in slopes)
  own = jnp.zeros(mask.shape, head.dtype) if own is None else own

  def gradients_of(hidden, head, tokens, mask, seen, slopes):
    rows = hidden.reshape(-1, hidden.shape[-1])
    flat = jax.tree.map(jnp.ravel, (tokens, mask, seen, slopes))
    gradients = tiles.gradients_of(tiling, layout, rows, head, *flat)
    return gradients._replace(hidden=gradients.hidden.reshape(hidden.shape))

  at = layout.tokens
  specs = (*layout.specs(head), at, at, at, at)
  run = layout.on_devices(gradients_of, specs, gradient_specs(layout, head))
  gradients = run(hidden, head, tokens, mask, seen, Slopes(own, entropy))
  return *in_dtypes(gradients, hidden, head), None, None


log_probs.defvjp(_forward, _backward, symbolic_zeros=True)  # most losses have no entropy in them


def on_devices(
  tiling: Tiling,
  layout: Layout,
  hidden: jax.Array,
  head: Head,
  tokens: jax.Array,
  mask: jax.Array,
  slopes: Any = None,
  per_token: Any = (),
  numbers: tuple = (),
) -> tuple[TokenLogProbs, Seen, Gradients | None]:
  """Goes over the tokens `[..., T]` of each device; slopes are of (numbers, log_probs, …)."""

  def own(hidden, head, tokens, mask, per_token, numbers):
    rows = hidden.reshape(-1, hidden.shape[-1])
    flat = jax.tree.map(jnp.ravel, per_token)
    slopes_of = None if slopes is None else functools.partial(slopes, numbers)
    *per_row, gradients = over_chunks(
      tiling, layout, rows, head, tokens.ravel(), mask.ravel(), slopes_of, flat
    )
    outputs, seen = jax.tree.map(lambda x: x.reshape(tokens.shape), per_row)
    if gradients is not None:
      gradients = gradients._replace(hidden=gradients.hidden.reshape(hidden.shape))
    return outputs, seen, gradients

  at = layout.tokens
  results = (at, at, None if slopes is None else gradient_specs(layout, head))
  specs = (*layout.specs(head), at, at, at, jax.sharding.PartitionSpec())
  return layout.on_devices(own, specs, results)(hidden, head, tokens, mask, per_token, numbers)


def gradient_specs(layout: Layout, head: Head) -> Gradients:
  """Returns the specs of gradients, which lie as what they belong to."""
  states, heads = layout.specs(head)
  return Gradients(states, heads.unembedding, heads.bias)


def in_dtypes(gradients: Any, hidden: jax.Array, head: Head) -> tuple[jax.Array, Head]:
  """Casts gradients, scaled by what came in from above, to the dtypes of what they belong to.

  All of them, whatever is differentiated: JAX may pair the residuals of one trace with the backward
  rule of another, so their tree must not depend on it. The compiler drops what nobody reads.
  """
  d_hidden, d_unembedding, d_bias = once(gradients)
  bias = None if head.bias is None else cast(d_bias, head.bias.dtype)
  constant: Any = None  # softcap and temperature
  own = Head(cast(d_unembedding, head.unembedding.dtype), bias, constant, constant)
  return cast(d_hidden, hidden.dtype), own
