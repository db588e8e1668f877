"""Log-probabilities of the sampled tokens, entropies and KLs, from logits `[..., T, V]`.

Each takes logits of any float dtype, computes in float32 at least, and scales them first:

    z = softcap · tanh(logits / softcap) / temperature,   over the support

With the temperature, softcap and support (top-k or top-p) of the sampler, these are the
log-probabilities that it sampled from. From hidden states, without logits: `gpo_jax.linear`.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from gpo_jax import vocabulary
from gpo_jax._inputs import (
  as_array,
  as_ids,
  as_number_in_range,
  check_same_shape,
  describe,
)


def token_log_probs(
  logits: jax.Array,
  tokens: jax.Array,
  *,
  temperature: chex.Numeric = 1.0,
  support: jax.Array | None = None,
  softcap: chex.Numeric | None = None,
) -> jax.Array:
  """Computes log-probabilities of the sampled tokens, or of K tokens per position.

      log π_t = z_{y_t} − log Σ_v exp(z_v)

  The gradient is computed in float32 too, and rounded once to the dtype of the logits.

  Args:
    logits: `[..., T, V]`.
    tokens: the sampled tokens, `[..., T]` integers in [0, V), or K ids per position, `[..., T, K]`.
      An id outside gives NaN.
    temperature: > 0.
    support: bools that broadcast to the logits: probabilities are renormalised over it, and a token
      outside is −inf. `mask[..., None]` keeps what padded logits hold, NaN too, out of the
      gradient.
    softcap: > 0; None disables it.

  Returns:
    Log-probabilities ≤ 0, of the shape of tokens.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Example:
    >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    >>> print(token_log_probs(logits, jnp.array([0, 2])))
    [-0.693 -0.223]
    >>> print(token_log_probs(logits, jnp.array([[0, 1], [2, 0]])))
    [[-0.693 -1.386]
     [-0.223 -2.303]]
    >>> print(token_log_probs(logits, jnp.array([0, 2]), support=jnp.array([True, True, False])))
    [-0.405   -inf]
  """
  scaled = _scaling(logits, support, temperature, softcap)
  z = scaled()
  ids = as_tokens(tokens, z.shape[:-1], f"logits {list(z.shape)}", several=True)
  known = (ids >= 0) & (ids < z.shape[-1])
  ids = jnp.where(known, ids, 0).astype(jnp.int32)
  # Taken before the scaling, so that no array of scaled logits has to be kept for it.
  own = scaled(lambda x: jnp.take_along_axis(x, ids, axis=-1))
  own = _as_part_of(z, jax.lax.stop_gradient(own), ids)
  # Relative to the largest logit, so that the difference keeps its digits however large logits are.
  largest = jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))
  log_probs = own - largest - jnp.log(jnp.sum(jnp.exp(z - largest), axis=-1, keepdims=True))
  log_probs = jnp.where(own == jnp.finfo(own.dtype).min, -jnp.inf, log_probs)
  return jnp.where(known, log_probs, jnp.nan).reshape(np.shape(tokens))


@jax.custom_jvp
def _as_part_of(z: jax.Array, own: jax.Array, ids: jax.Array) -> jax.Array:
  """Returns `z[ids]`, which is own, with its slope: the gradient is added up before it is cast."""
  return own


@_as_part_of.defjvp
def _slope_of_part(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
  (z, _, ids), slope = primals, tangents[0]
  own = _as_part_of(*primals)
  if ids.shape[-1] > 1:
    return own, jnp.take_along_axis(slope, ids, axis=-1)
  # Not a gather, whose gradient would be scattered into an array of zeros.
  chosen = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1) == ids
  return own, jnp.sum(jnp.where(chosen, slope, 0), axis=-1, keepdims=True)


def token_entropy(
  logits: jax.Array,
  *,
  temperature: chex.Numeric = 1.0,
  support: jax.Array | None = None,
  softcap: chex.Numeric | None = None,
) -> jax.Array:
  """Computes the entropy of the policy at each position.

      H_t = −Σ_v p_v log p_v,   p = softmax(z)

  Args:
    logits: `[..., T, V]`; −inf for a token of probability 0.
    temperature: as in `token_log_probs`.
    support: as in `token_log_probs`.
    softcap: as in `token_log_probs`.

  Returns:
    Entropies in nats, `[..., T]`, in [0, log V] up to rounding.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Example:
    >>> print(token_entropy(jnp.array([[0.0, 0.0], [0.0, -jnp.inf]])))
    [0.693 0.   ]
  """
  log_probs = _log_softmax(_scaling(logits, support, temperature, softcap)())
  probs = jnp.exp(log_probs)
  return jnp.sum(probs * -jnp.where(probs > 0, log_probs, 0), axis=-1)


def token_divergence(
  function: Callable[[jax.Array, jax.Array], jax.Array],
  logits: jax.Array,
  ref_logits: jax.Array,
  *,
  temperature: chex.Numeric = 1.0,
  support: jax.Array | None = None,
  softcap: chex.Numeric | None = None,
) -> jax.Array:
  """Computes a divergence of whole distributions at each position, without sampling noise.

      function(log π, log π_ref)_t,   such as KL_t = Σ_v p_v (log p_v − log q_v)

  As an objective's divergence, close over it: `objective.replace(divergence=lambda *_: kl)`; no
  `ref_log_probs` are needed. That keeps the distribution of states at π_old's;
  `divergences.sequence_exact` weighs it so that the sum over a response is the KL of responses,
  off-policy too.

  Args:
    function: a function of `gpo_jax.vocabulary`, or one of its signature.
    logits: of the policy, `[..., T, V]`.
    ref_logits: of the reference policy or the teacher, of the same shape; no gradient flows to
      them.
    temperature: as in `token_log_probs`, for both.
    support: as in `token_log_probs`, for both.
    softcap: as in `token_log_probs`, for both.

  Returns:
    Divergences, `[..., T]`.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Example:
    >>> logits, teacher = jnp.log(jnp.array([[[0.5, 0.5]], [[0.25, 0.75]]]))
    >>> print(token_divergence(vocabulary.forward_kl, logits, teacher))
    [0.131]
  """
  check_function(function)
  scaled = _scaling(logits, support, temperature, softcap)()
  reference = _scaling(ref_logits, support, temperature, softcap, "ref_logits")()
  check_same_shape(logits=scaled, ref_logits=reference)
  return function(_log_softmax(scaled), _log_softmax(jax.lax.stop_gradient(reference)))


def exact_kl(logits: jax.Array, ref_logits: jax.Array, **settings: Any) -> jax.Array:
  """Computes KL(π‖π_ref) at each position: `token_divergence` of `vocabulary.kl`.

  Example:
    >>> print(exact_kl(jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))))
    [0.144]
  """
  return token_divergence(vocabulary.kl, logits, ref_logits, **settings)


def check_function(function: Any) -> None:
  """Checks a divergence of distributions."""
  if not callable(function):
    raise ValueError(f"function must be one of gpo.vocabulary; got {function!r:.60}")


def as_tokens(
  tokens: Any, shape: tuple[int, ...], of: str, *, several: bool = False, name: str = "tokens"
) -> jax.Array:
  """Converts token ids, `[..., T]`; or, if there may be several, one or K, to `[..., T, K]`."""
  tokens = as_ids(name, tokens, "pass the ids of the sampled tokens")
  if tokens.shape != shape and not (several and tokens.size and tokens.shape[:-1] == shape):
    raise ValueError(
      f"{name} must have one id per position, {list(shape)} for {of}{', or K' if several else ''}; "
      f"got {list(tokens.shape)}: shift them so that position t holds the token sampled from it"
    )
  return tokens[..., None] if several and tokens.shape == shape else tokens


def _log_softmax(logits: jax.Array) -> jax.Array:
  return jax.nn.log_softmax(logits, axis=-1)


def _scaling(
  logits: jax.Array,
  support: jax.Array | None,
  temperature: chex.Numeric,
  softcap: chex.Numeric | None,
  name: str = "logits",
) -> Callable[..., jax.Array]:
  """Checks logits and returns what scales them, or those that it is told to take."""
  logits = jnp.asarray(as_array(name, logits))
  if not logits.ndim or 0 in logits.shape:
    raise ValueError(
      f"{name} must be [..., T, V] with every axis at least 1; got {list(logits.shape)}"
    )
  dtype = jnp.float64 if logits.dtype == jnp.float64 else jnp.float32
  if support is not None:
    support = jnp.broadcast_to(_as_support(support, logits, name), logits.shape)
  if softcap is not None:
    softcap = as_number_in_range("softcap", softcap, dtype)
  temperature = as_number_in_range("temperature", temperature, dtype)

  def scaled(take: Callable[[jax.Array], jax.Array] = lambda x: x) -> jax.Array:
    """Returns what enters the softmax; the lowest number outside of the support."""
    z = take(logits).astype(dtype)
    inside = None if support is None else take(support)
    if inside is not None:
      z = jnp.where(inside, z, 0)  # what may be NaN must not meet a function with a slope
    if softcap is not None:
      z = softcap * jnp.tanh(z / softcap)
    z = z / temperature
    return z if inside is None else jnp.where(inside, z, jnp.finfo(dtype).min)

  return scaled


def _as_support(support: Any, logits: jax.Array, name: str) -> jax.Array:
  support = jnp.asarray(as_array("support", support)).astype(bool)
  sizes = zip(support.shape[::-1], logits.shape[::-1], strict=False)
  if support.ndim > logits.ndim or any(size not in (1, full) for size, full in sizes):
    raise ValueError(
      "support must broadcast to the logits, a mask of the vocabulary; got "
      f"{describe(**{'support': support, name: logits})}. For a mask of tokens pass mask[..., None]"
    )
  return jnp.expand_dims(support, range(logits.ndim - support.ndim))
