"""Log-probabilities of the sampled tokens, entropies and KLs, from logits `[..., T, V]`.

Each takes logits of any float dtype, computes in float32 at least, and scales them first:

    z = softcap · tanh(logits / softcap) / temperature,   over the support

With the temperature, softcap and support (top-k or top-p) of the sampler, these are the
log-probabilities that it sampled from. From hidden states, without logits: `gpo_jax.linear`.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from gpo_jax import vocabulary
from gpo_jax._inputs import (
  as_array,
  as_ids,
  as_number_in_range,
  check_same_shape,
  describe,
  promote,
)


def token_log_probs(
  logits: jax.Array,
  tokens: jax.Array,
  *,
  temperature: chex.Numeric = 1.0,
  support: jax.Array | None = None,
  softcap: chex.Numeric | None = None,
) -> jax.Array:
  """Computes log-probabilities of the sampled tokens.

      log π_t = z_{y_t} − log Σ_v exp(z_v)

  Args:
    logits: `[..., T, V]`.
    tokens: the sampled tokens, `[..., T]` integers in [0, V). An id outside gives NaN.
    temperature: > 0.
    support: bools that broadcast to the logits: probabilities are renormalised over it, and a token
      outside is −inf. `mask[..., None]` keeps what padded logits hold, NaN too, out of the
      gradient.
    softcap: > 0; None disables it.

  Returns:
    Log-probabilities ≤ 0, `[..., T]`.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Example:
    >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    >>> print(token_log_probs(logits, jnp.array([0, 2])))
    [-0.693 -0.223]
    >>> print(token_log_probs(logits, jnp.array([0, 2]), support=jnp.array([True, True, False])))
    [-0.405   -inf]
  """
  logits = _scale(logits, support, temperature, softcap)
  tokens = as_tokens(tokens, logits.shape[:-1], f"logits {list(logits.shape)}")
  # A negative id is outside too; NumPy's convention would wrap it around.
  index = jnp.where(tokens < 0, logits.shape[-1], tokens)[..., None]
  logit = jnp.take_along_axis(logits, index, axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]
  # Relative to the largest logit, so that the difference keeps its digits however large logits are.
  largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  log_probs = logit - largest[..., 0] - jnp.log(jnp.sum(jnp.exp(logits - largest), axis=-1))
  return jnp.where(logit == jnp.finfo(logits.dtype).min, -jnp.inf, log_probs)


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
  log_probs = _log_softmax(_scale(logits, support, temperature, softcap))
  probs = jnp.exp(log_probs)
  return jnp.sum(probs * -jnp.where(probs > 0, log_probs, 0), axis=-1)


def exact_kl(
  logits: jax.Array,
  ref_logits: jax.Array,
  *,
  temperature: chex.Numeric = 1.0,
  support: jax.Array | None = None,
  softcap: chex.Numeric | None = None,
) -> jax.Array:
  """Computes KL(π‖π_ref) at each position from both distributions, without sampling noise.

      KL_t = Σ_v p_v (log p_v − log q_v)

  As an objective's divergence, close over it: `objective.replace(divergence=lambda *_: kl)`; no
  `ref_log_probs` are needed. That keeps the distribution of states at π_old's;
  `divergences.sequence_exact` weighs it so that the sum over a response is the KL of responses,
  off-policy too.

  Args:
    logits: of the policy, `[..., T, V]`.
    ref_logits: of the reference policy, of the same shape; no gradient flows to them.
    temperature: as in `token_log_probs`, for both.
    support: as in `token_log_probs`, for both.
    softcap: as in `token_log_probs`, for both.

  Returns:
    Divergences in nats, `[..., T]`, ≥ 0 up to rounding; inf if π_ref excludes a token that π does
    not.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Example:
    >>> print(exact_kl(jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))))
    [0.144]

  Reference: see `vocabulary.kl`.
  """
  scaled = _scale(logits, support, temperature, softcap)
  reference = _scale(ref_logits, support, temperature, softcap, "ref_logits")
  check_same_shape(logits=scaled, ref_logits=reference)
  return vocabulary.kl(_log_softmax(scaled), _log_softmax(jax.lax.stop_gradient(reference)))


def as_tokens(tokens: Any, shape: tuple[int, ...], of: str) -> jax.Array:
  """Converts token ids that have one value per position."""
  tokens = as_ids("tokens", tokens, "pass the ids of the sampled tokens")
  if tokens.shape != shape:
    raise ValueError(
      f"tokens must have one id per position, {list(shape)} for {of}; got {list(tokens.shape)}: "
      "shift them so that position t holds the token sampled from it"
    )
  return tokens


def _log_softmax(logits: jax.Array) -> jax.Array:
  return jax.nn.log_softmax(logits, axis=-1)


def _scale(
  logits: jax.Array,
  support: jax.Array | None,
  temperature: chex.Numeric,
  softcap: chex.Numeric | None,
  name: str = "logits",
) -> jax.Array:
  """Scales logits to what enters the softmax; the lowest number outside of the support."""
  (logits,) = promote(as_array(name, logits))
  if not logits.ndim or 0 in logits.shape:
    raise ValueError(
      f"{name} must be [..., T, V] with every axis at least 1; got {list(logits.shape)}"
    )
  if support is not None:
    support = _as_support(support, logits, name)
    logits = jnp.where(support, logits, 0)  # what may be NaN must not meet a function with a slope
  if softcap is not None:
    softcap = as_number_in_range("softcap", softcap, logits.dtype)
    logits = softcap * jnp.tanh(logits / softcap)
  logits = logits / as_number_in_range("temperature", temperature, logits.dtype)
  return logits if support is None else jnp.where(support, logits, jnp.finfo(logits.dtype).min)


def _as_support(support: Any, logits: jax.Array, name: str) -> jax.Array:
  support = jnp.asarray(as_array("support", support)).astype(bool)
  sizes = zip(support.shape[::-1], logits.shape[::-1], strict=False)
  if support.ndim > logits.ndim or any(size not in (1, full) for size, full in sizes):
    raise ValueError(
      "support must broadcast to the logits, a mask of the vocabulary; got "
      f"{describe(**{'support': support, name: logits})}. For a mask of tokens pass mask[..., None]"
    )
  return jnp.expand_dims(support, range(logits.ndim - support.ndim))
