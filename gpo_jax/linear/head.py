"""The head: what makes logits of hidden states, a tile of the vocabulary at a time.

Logits are `[V, C]`, the vocabulary first: a tile of them is one piece of memory, and the
unembedding's gradient, which is accumulated in memory, needs no transposed operand.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from gpo_jax._inputs import as_array, as_number_in_range, describe


class Head(NamedTuple):
  """What turns hidden states into logits: softcap(h Wᵀ + b) / temperature.

  Attributes:
    unembedding: W, `[V, H]`.
    bias: b, `[V]`; −inf bans a token, without a softcap. None for no bias.
    softcap: c > 0 for logits c·tanh(logits/c); None disables it. Not differentiable.
    temperature: > 0, that of the sampler. Not differentiable.
  """

  unembedding: jax.Array
  bias: jax.Array | None = None
  softcap: chex.Numeric | None = None
  temperature: chex.Numeric = 1.0

  @property
  def dtype(self) -> Any:
    """The dtype of logits, and of gradients while they are accumulated."""
    return jnp.result_type(self.temperature)


def as_head(hidden: Any, head: Any, of: str = "") -> tuple[jax.Array, Head]:
  """Converts hidden states and a head; `of` is what their names begin with."""
  given = head if isinstance(head, Head) else Head(head)
  hidden = jnp.asarray(as_array(f"{of}hidden", hidden))
  name = f"{of}head" if given is not head else f"{of}unembedding"
  unembedding = jnp.asarray(as_array(name, given.unembedding))
  got = describe(**{f"{of}hidden": hidden, name: unembedding})
  fits = hidden.ndim > 1 and unembedding.ndim == 2 and hidden.shape[-1] == unembedding.shape[1]
  if not fits or 0 in hidden.shape + unembedding.shape:
    raise ValueError(
      f"{of}hidden must be [..., T, H] and {name} [V, H], an unembedding, every axis at least 1; "
      f"got {got}: transpose a kernel [H, V]"
    )
  if not all(isinstance(size, int) for size in hidden.shape + unembedding.shape):
    raise ValueError(
      f"{of}hidden and {name} must have known sizes, to be cut into chunks; got {got}: export with "
      "a batch of a fixed size, or use token_log_probs(hidden @ unembedding.T, tokens)"
    )
  bias = given.bias
  if bias is not None:
    bias = jnp.asarray(as_array(f"{of}bias", bias))
    if bias.shape != unembedding.shape[:1]:
      raise ValueError(f"{of}bias must be [V]; got {list(bias.shape)} with {got}")
  dtype, softcap = accumulator(hidden.dtype, unembedding.dtype), given.softcap
  if softcap is not None:
    softcap = _constant(as_number_in_range("softcap", softcap, dtype))
  temperature = as_number_in_range("temperature", given.temperature, dtype)
  return hidden, Head(unembedding, bias, softcap, _constant(temperature))


@jax.custom_jvp
def _constant(x: jax.Array) -> jax.Array:
  return x


@_constant.defjvp
def _constant_jvp(primals: tuple, tangents: tuple):
  raise NotImplementedError(
    "softcap and temperature are not differentiable from hidden states: differentiate with respect "
    "to the unembedding and the bias, or use token_log_probs(hidden @ unembedding.T, tokens)"
  )


def accumulator(*dtypes: Any) -> Any:
  """Returns the dtype to accumulate in: the widest, float32 at least."""
  return functools.reduce(wider, dtypes, jnp.float32)


def wider(a: Any, b: Any) -> Any:
  """Returns the dtype that holds both; JAX's own promotion may be configured to raise."""
  try:
    return np.promote_types(a, b)
  except TypeError:  # neither of bfloat16 and float16 holds the other
    return jnp.float32


def dot(subscripts: str, a: jax.Array, b: jax.Array, narrow: bool = True) -> jax.Array:
  """Multiplies in the wider input dtype, accumulates in float32 at least.

  With `narrow` false it also multiplies in float32 at least: CPUs have no narrower products.
  """
  dtype = wider(a.dtype, b.dtype)
  dtype = dtype if narrow else accumulator(dtype)
  preferred = accumulator(dtype)
  return jnp.einsum(subscripts, a.astype(dtype), b.astype(dtype), preferred_element_type=preferred)


def rows_of(x: jax.Array, start: Any, size: int) -> jax.Array:
  """Slices rows."""
  return x if x.shape[0] == size else jax.lax.dynamic_slice_in_dim(x, start, size)


def logits_of(hidden: jax.Array, head: Head, start: Any, size: int, narrow: bool) -> jax.Array:
  """Computes the logits of a tile of the vocabulary, `[size, C]`, of hidden states `[C, H]`."""
  logits = dot("vh,ch->vc", rows_of(head.unembedding, start, size), hidden, narrow)
  bias = None if head.bias is None else rows_of(head.bias, start, size)[:, None]
  return scale_logits(logits, bias, head)


def own_products(hidden: jax.Array, head: Head, ids: jax.Array) -> jax.Array:
  """Computes h·W_id + b_id, one id per position; 0 if it is not in this part of the vocabulary."""
  row = lambda x: x.at[ids].get(mode="clip").astype(head.dtype)  # noqa: E731
  products = jnp.sum(hidden.astype(head.dtype) * row(head.unembedding), axis=-1)
  products = products if head.bias is None else products + row(head.bias)
  return jnp.where((ids >= 0) & (ids < head.unembedding.shape[0]), products, 0)


def scale_logits(products: jax.Array, bias: jax.Array | None, head: Head) -> Any:
  """Computes logits from h Wᵀ."""
  logits = products if bias is None else products + bias.astype(products.dtype)
  if head.softcap is not None:
    logits = head.softcap * jnp.tanh(logits / head.softcap)
  return logits / head.temperature


def over_tiles(vocabulary: int, size: int, step: Any, carry: Any) -> Any:
  """Calls `step(start, size, carry)` for every tile, the last of which may be smaller."""
  whole, rest = divmod(vocabulary, size)
  if whole > 1:
    carry = jax.lax.fori_loop(0, whole, lambda i, carry: step(i * size, size, carry), carry)
  else:
    carry = step(0, size, carry)
  return step(whole * size, rest, carry) if rest else carry
