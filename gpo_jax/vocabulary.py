"""Divergences of whole distributions over the vocabulary, without sampling noise.

Each is `(log_probs, ref_log_probs) -> divergence`, `[..., V]` to `[...]`: normalised
log-probabilities of the policy and of the reference, −inf for a token of probability 0.
`gpo.exact_kl` computes one from logits, `gpo.linear_divergence` from hidden states.
"""

import jax
import jax.numpy as jnp


def kl(log_probs: jax.Array, ref_log_probs: jax.Array) -> jax.Array:
  """Computes KL(π‖π_ref) = Σ_v p_v (log p_v − log q_v).

  Returns:
    Divergences in nats, ≥ 0 up to rounding; inf if π_ref excludes a token that π does not.

  Example:
    >>> print(kl(jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))))
    [0.144]

  Reference: "Rao-Blackwellised" estimation of the KL, as in Amini et al. (2025), arXiv:2504.10637.
  """
  probs = jnp.exp(log_probs)
  return jnp.sum(probs * jnp.where(probs > 0, log_probs - ref_log_probs, 0), axis=-1)
