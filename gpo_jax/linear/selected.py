"""Log-probabilities at selected ids per position, of the whole vocabulary or of a support.

Their logits are products with rows of the unembedding, one id of all positions at a time, so that
no `[..., T, K, H]` is held; gradients are added to the rows that were read.
"""

import functools

import jax
import jax.numpy as jnp

from gpo_jax._mesh import vary
from gpo_jax.linear import two_passes
from gpo_jax.linear.backward import Gradients, zero_gradients
from gpo_jax.linear.chunks import Tiling
from gpo_jax.linear.derivatives import once
from gpo_jax.linear.forward import TokenLogProbs
from gpo_jax.linear.head import Head, own_products, scale_logits
from gpo_jax.linear.mesh import Layout


def log_probs(
  tiling: Tiling, layout: Layout, hidden: jax.Array, head: Head, ids: jax.Array, mask: jax.Array
) -> TokenLogProbs:
  """Computes log-probabilities at ids `[..., T, K]`, and entropies.

  log π_k = log π_j + z_k − z_j,   j the most probable of the K, from one pass over all
  """
  logits = _logits(layout, hidden, head, ids, mask)
  best = jnp.argmax(jnp.where(jnp.isnan(logits), -jnp.inf, logits), axis=-1)
  chosen = jax.nn.one_hot(best, ids.shape[-1], dtype=bool)
  token = jnp.sum(jnp.where(chosen, ids, 0), axis=-1)
  logit = jnp.sum(jnp.where(chosen & jnp.isfinite(logits), logits, 0), axis=-1, keepdims=True)
  own, entropy = two_passes.log_probs(tiling, layout, hidden, head, token, mask)
  return TokenLogProbs(jnp.where(mask[..., None], own[..., None] + logits - logit, 0), entropy)


def within(
  layout: Layout,
  hidden: jax.Array,
  head: Head,
  ids: jax.Array,
  mask: jax.Array,
  support: jax.Array,
) -> TokenLogProbs:
  """Computes log-probabilities at ids `[..., T, K]` of a softmax over the support `[..., T, S]`."""
  support = jnp.sort(jnp.where(mask[..., None], support, -1), axis=-1)
  again = jnp.concatenate([support[..., :1] < 0, support[..., 1:] == support[..., :-1]], axis=-1)
  listed, size = (support >= 0) & ~again, support.shape[-1]
  logits = _logits(layout, hidden, head, jnp.concatenate([support, ids], axis=-1), mask)
  kept = jnp.where(listed, logits[..., :size], -jnp.inf)
  own, log_total = logits[..., size:], jax.nn.logsumexp(kept, axis=-1, keepdims=True)
  inside = jnp.any((ids[..., None] == support[..., None, :]) & listed[..., None, :], axis=-1)
  own = jnp.where(inside | jnp.isnan(own), own - log_total, -jnp.inf)
  log_probs = jnp.where(kept > -jnp.inf, kept - log_total, 0)  # then p log p is 0
  entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
  return TokenLogProbs(jnp.where(mask[..., None], own, 0), jnp.where(mask, entropy, 0))


def _logits(
  layout: Layout, hidden: jax.Array, head: Head, ids: jax.Array, mask: jax.Array
) -> jax.Array:
  """Computes logits at ids `[..., T, K]`; NaN for an id outside of the vocabulary."""
  known = (ids >= 0) & (ids < head.unembedding.shape[0])
  products = _products(layout, jnp.where(mask[..., None], hidden, 0), head, ids)
  return jnp.where(known, scale_logits(products, None, head), jnp.nan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _products(layout: Layout, hidden: jax.Array, head: Head, ids: jax.Array) -> jax.Array:
  def own(hidden, head, ids):
    head = layout.gather(head)
    ids, _ = layout.own_tokens(ids, head)
    products = jax.lax.map(functools.partial(own_products, hidden, head), jnp.moveaxis(ids, -1, 0))
    return layout.over_vocabulary(jnp.moveaxis(products, 0, -1))

  specs = (*layout.specs(head), layout.tokens)
  return layout.on_devices(own, specs, layout.tokens)(hidden, head, ids)


def _forward(layout, *arguments):
  return once(_products(layout, *arguments)), arguments


def _backward(layout, arguments, slopes):
  def own(hidden, head, ids, slopes):
    head = layout.gather(head)
    ids, _ = layout.own_tokens(ids, head)
    # JAX would count negative ids from the end.
    ids = jnp.where(ids < 0, head.unembedding.shape[0], ids)

    def add(gradients, of_one):
      ids, slope = of_one
      d_hidden, d_unembedding, d_bias = gradients
      rows = head.unembedding.at[ids].get(mode="fill", fill_value=0)
      d_rows = slope[..., None] * hidden.astype(slope.dtype)
      d_hidden += slope[..., None] * rows.astype(slope.dtype)
      d_unembedding = d_unembedding.at[ids].add(d_rows, mode="drop")
      d_bias = None if d_bias is None else d_bias.at[ids].add(slope, mode="drop")
      return Gradients(d_hidden, d_unembedding, d_bias), None

    each = jnp.moveaxis(ids, -1, 0), jnp.moveaxis(slopes, -1, 0)
    _, zeros = vary((slopes, zero_gradients(hidden, head)))
    return layout.reduce(jax.lax.scan(add, zeros, each)[0])

  hidden, head, ids = arguments
  specs = (*layout.specs(head), layout.tokens, layout.tokens)
  run = layout.on_devices(own, specs, two_passes.gradient_specs(layout, head))
  return *two_passes.in_dtypes(run(hidden, head, ids, slopes), hidden, head), None


_products.defvjp(_forward, _backward)
