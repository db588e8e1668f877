"""Divergences of whole distributions over the vocabulary, without sampling noise.

Each is `(log_probs, ref_log_probs) -> divergence`, `[..., V]` to `[...]`: normalised
log-probabilities of the policy π and of the reference or teacher π_ref, −inf for a token of
probability 0. `gpo.token_divergence` computes one from logits, `gpo.linear_divergence` from hidden
states.

Sums are of D(p, q) = p log(p/q) − p + q, which is ≥ 0 for each entry and adds up to KL(p‖q): small
divergences keep their digits, where Σ p log(p/q) is left with the rounding of log p.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from gpo_jax._inputs import as_number_in_range, as_size


def kl(log_probs: jax.Array, ref_log_probs: jax.Array) -> jax.Array:
  """Computes KL(π‖π_ref) = Σ_v p_v (log p_v − log q_v), which seeks a mode of π_ref.

  Returns:
    Divergences in nats, ≥ 0; inf if π_ref excludes a token that π does not.

  Example:
    >>> print(kl(jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))))
    [0.144]

  Reference: "Rao-Blackwellised" estimation of the KL, as in Amini et al. (2025), arXiv:2504.10637.
  """
  return jnp.sum(_terms(log_probs, ref_log_probs), axis=-1)


def forward_kl(log_probs: jax.Array, ref_log_probs: jax.Array) -> jax.Array:
  """Computes KL(π_ref‖π) = Σ_v q_v (log q_v − log p_v), which covers all modes of π_ref.

  Returns:
    Divergences in nats, ≥ 0; inf if π excludes a token that π_ref does not.

  Example:
    >>> print(forward_kl(jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))))
    [0.131]

  Reference: Hinton, Vinyals and Dean (2015), arXiv:1503.02531, eq. 4: its gradient in the logits is
  p − q.
  """
  return kl(ref_log_probs, log_probs)


def jensen_shannon(
  log_probs: jax.Array, ref_log_probs: jax.Array, *, beta: chex.Numeric = 0.5
) -> jax.Array:
  """Computes the generalised Jensen-Shannon divergence, which is bounded.

      JSD_β = β KL(π_ref‖m) + (1 − β) KL(π‖m),   m = β π_ref + (1 − β) π

  It vanishes at both ends: JSD_β/β → KL(π_ref‖π) as β → 0, JSD_β/(1 − β) → KL(π‖π_ref) as β → 1.
  TRL and Liger-Kernel weigh likewise, and switch to the forward KL itself at β = 0 and the reverse
  KL at β = 1: use `forward_kl` and `kl`. Exchanging π and π_ref exchanges β and 1 − β.

  Args:
    log_probs: of the policy, `[..., V]`.
    ref_log_probs: of the reference, `[..., V]`.
    beta: the share of the reference in the mixture, in (0, 1).

  Returns:
    Divergences in nats, in [0, log 2] for β = 1/2, finite whatever either excludes.

  Example:
    >>> p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> print(jnp.stack([jensen_shannon(p, q), jensen_shannon(p, q, beta=0.01) / 0.01]))
    [0.034 0.13 ]

  Reference: Agarwal et al. (2023), arXiv:2306.13649, eq. 1, with the teacher as its P.
  """
  beta = as_number_in_range("jensen_shannon.beta", beta, jnp.result_type(log_probs))
  # What both exclude has a finite logarithm here: logaddexp has no gradient at −∞ twice.
  finite = lambda x: jnp.maximum(x, float(jnp.finfo(x.dtype).min) / 2)  # noqa: E731
  ref, own = finite(ref_log_probs), finite(log_probs)
  mixture = jnp.logaddexp(jnp.log(beta) + ref, jnp.log1p(-beta) + own)
  return beta * kl(ref_log_probs, mixture) + (1 - beta) * kl(log_probs, mixture)


def top_k(
  log_probs: jax.Array,
  ref_log_probs: jax.Array,
  *,
  k: int,
  divergence: Callable[[jax.Array, jax.Array], jax.Array] = kl,
) -> jax.Array:
  """Computes a divergence over the reference's k most probable tokens and all others as one.

  Merging tokens can only make a KL or a Jensen-Shannon divergence smaller, and keeps it one: 0 only
  if all k probabilities agree. A sum over k tokens without the tail can be negative. Of a teacher
  that sent only its k ids and log-probabilities, it is

      ids, teacher                                      # [..., T, k] each
      policy = gpo.token_log_probs(logits, ids)         # or linear_token_log_probs(...).log_probs
      vocabulary.kl(vocabulary.with_tail(policy), vocabulary.with_tail(teacher))

  Args:
    log_probs: of the policy, `[..., V]`.
    ref_log_probs: of the reference, `[..., V]`.
    k: how many tokens.
    divergence: another function of this module.

  Returns:
    Divergences in nats.

  Raises:
    ValueError: if k is not in [1, V].

  Example:
    >>> p, q = jnp.log(jnp.array([0.2, 0.3, 0.5])), jnp.log(jnp.array([0.6, 0.3, 0.1]))
    >>> print(jnp.stack([kl(p, q), top_k(p, q, k=1)]))
    [0.585 0.335]
  """
  if as_size("k", k) > ref_log_probs.shape[-1]:
    raise ValueError(f"k must be at most V = {ref_log_probs.shape[-1]}; got {k}")
  listed, ids = jax.lax.top_k(ref_log_probs, k)
  own = jnp.take_along_axis(log_probs, ids, axis=-1)
  return divergence(with_tail(own), with_tail(listed))


def with_tail(log_probs: jax.Array) -> jax.Array:
  """Appends the log-probability of all tokens that are not listed, log(1 − Σ_k p_k).

  Args:
    log_probs: at K different tokens, `[..., K]`.

  Returns:
    `[..., K + 1]`. The tail is at least the dtype's epsilon, which is what rounding leaves of it;
    NaN if the listed probabilities add up to more than 1.05: they are not probabilities, or of
    another temperature.

  Example:
    >>> print(jnp.exp(with_tail(jnp.log(jnp.array([0.5, 0.3])))))
    [0.5 0.3 0.2]
  """
  rest = 1 - jnp.sum(jnp.exp(log_probs), axis=-1, keepdims=True)
  tail = jnp.where(rest < -0.05, jnp.nan, jnp.maximum(rest, jnp.finfo(rest.dtype).eps))
  return jnp.concatenate([log_probs, jnp.log(tail)], axis=-1)


def _terms(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
  """Computes p log(p/q) − p + q, from log-probabilities.

  That is p (e^x − x − 1) of x = log(q/p). `exp_excess` would be exact for the smallest x too, but
  its series costs a dozen operations for each entry of the vocabulary.
  """
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  x = jnp.where(p > 0, log_q - log_p, 1)
  near = jnp.minimum(x, 1)
  return jnp.where(x < 1, p * (jnp.expm1(near) - near), q - p - p * x)
