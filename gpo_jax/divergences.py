"""Divergences: the penalty for leaving the reference policy, token by token.

Each is `(ref_log_ratio, log_ratio, rollout) -> penalty`, with δ = log π − log π_ref, d = log π −
log π_old and ρ = e^d, of the tokens, whatever the objective's level; all `[..., T]`. Samples come
from π_old. An estimator may be unbiased in value and biased in gradient; p is π, q is π_ref, μ is
π_old:

    name                value: p = μ / p ≠ μ        gradient: p = μ / p ≠ μ
    k1                  KL(p‖q) / biased             0 (noise) / −∇KL(μ‖p)
    k2                  E[δ²/2] / biased             ∇KL(p‖q) / biased
    k3                  KL(p‖q) / biased             ∇KL(q‖p) / biased
    absolute            E|δ| / biased                ∇2TV(p, q) / biased
    straight_through    KL(p‖q) / biased             ∇KL(p‖q) / biased
    unbiased            KL(p‖q) / KL(p‖q)            ∇KL(p‖q) / ∇KL(p‖q)
    chi2_minus_kl       χ² − KL / χ² − KL            ∇(χ² − KL) / ∇(χ² − KL)
    forward_kl          KL(q‖p) / KL(q‖p)            ∇KL(q‖p) / ∇KL(q‖p)

That holds for one token; `sequence_unbiased` and `sequence_exact` are exact for whole responses. A
penalty of your own may ignore δ, which is None for a rollout without a reference policy.
"""

import jax
import jax.numpy as jnp

from gpo_jax import _segments
from gpo_jax._numerics import bound, exp_excess, with_slope
from gpo_jax.traits import slot_function
from gpo_jax.types import Rollout


@slot_function(tokenwise=True, needs_reference=True)
def k1(ref_log_ratio: jax.Array, log_ratio: jax.Array, rollout: Rollout) -> jax.Array:
  """Computes the log-ratio itself.

      δ

  Right in value, useless as a loss: on-policy its gradient is noise around 0. As part of the reward
  it is the textbook choice, with a mask of bools:
  `rewards - beta * jnp.sum(old_log_probs - ref_log_probs, -1, where=mask)`.

  Example:
    >>> print(k1(jnp.array([0.5]), None, None))
    [0.5]

  Reference: Schulman (2020), "Approximating KL divergence".
  """
  del log_ratio, rollout
  return ref_log_ratio


@slot_function(tokenwise=True, needs_reference=True)
def k2(ref_log_ratio: jax.Array, log_ratio: jax.Array, rollout: Rollout) -> jax.Array:
  """Computes half the squared log-ratio.

      δ²/2

  On-policy its gradient is exactly ∇KL(π‖π_ref); its value is not the KL.

  Example:
    >>> print(k2(jnp.array([2.0]), None, None))
    [2.]

  Reference: Schulman (2020), "Approximating KL divergence".
  """
  del log_ratio, rollout
  return ref_log_ratio**2 / 2


@slot_function(tokenwise=True, needs_reference=True)
def k3(ref_log_ratio: jax.Array, log_ratio: jax.Array, rollout: Rollout) -> jax.Array:
  """Computes GRPO's penalty, without cancellation.

      e^−δ + δ − 1

  On-policy an unbiased, positive estimate of KL(π‖π_ref), but its gradient is ∇KL(π_ref‖π). For the
  gradient of what it estimates, off-policy too, use `unbiased`.

  Example:
    >>> print(k3(jnp.array([0.0, -1.0]), None, None))
    [0.    0.718]

  Reference: Shao et al. (2024, GRPO), arXiv:2402.03300, Eq. 4.
  """
  del log_ratio, rollout
  return exp_excess(-ref_log_ratio)


@slot_function(tokenwise=True, needs_reference=True)
def absolute(ref_log_ratio: jax.Array, log_ratio: jax.Array, rollout: Rollout) -> jax.Array:
  """Computes the size of the log-ratio.

      |δ|

  On-policy its gradient is that of twice the total variation distance between π and π_ref; 0 if
  they agree, although `jnp.abs` has slope 1 at 0.

  Example:
    >>> print(absolute(jnp.array([-0.5]), None, None))
    [0.5]

  Reference: the `abs` penalty of verl.
  """
  del log_ratio, rollout
  return with_slope(jnp.abs(ref_log_ratio), jnp.sign(ref_log_ratio), ref_log_ratio)


@slot_function(tokenwise=True, needs_reference=True)
def straight_through(ref_log_ratio: jax.Array, log_ratio: jax.Array, rollout: Rollout) -> jax.Array:
  """Combines the value of `k3` with the gradient of `k2`.

      δ²/2 − sg(δ²/2) + sg(e^−δ + δ − 1)

  On-policy both belong to KL(π‖π_ref); off-policy neither does.

  Example:
    >>> print(jax.grad(straight_through)(-1.0, None, None))
    -1.0

  Reference: the `k3+` penalty of verl.
  """
  del log_ratio, rollout
  return with_slope(exp_excess(-ref_log_ratio), ref_log_ratio, ref_log_ratio)


@slot_function(tokenwise=True, needs_reference=True)
def unbiased(ref_log_ratio: jax.Array, log_ratio: jax.Array, rollout: Rollout) -> jax.Array:
  """Estimates KL(π‖π_ref), value and gradient without bias, off-policy as well.

      ρ(e^−δ + δ − 1),   ρ differentiable

  Computed as sg(ρ(e^−δ + δ − 1)) + sg(ρδ)(log π − sg(log π)), of the same value and gradient: under
  autodiff the two parts of the gradient cancel, and nothing is left of ρδ at δ = −30. Only first
  derivatives are those of the formula.

  Example:
    >>> print(jax.grad(lambda x: unbiased(x - 1.0, x, None))(0.0))  # ρδ
    -1.0

  Reference: DeepSeek-AI (2025, DeepSeek-V3.2), arXiv:2512.02556, Eq. 7.
  """
  del rollout
  ratio = jnp.exp(log_ratio)
  return with_slope(ratio * exp_excess(-ref_log_ratio), ratio * ref_log_ratio, ref_log_ratio)


@slot_function(needs_reference=True)
def sequence_unbiased(
  ref_log_ratio: jax.Array, log_ratio: jax.Array, rollout: Rollout
) -> jax.Array:
  """Estimates the KL of whole responses without bias, off-policy too.

      ρ_1⋯ρ_t (e^−δ_t + δ_t − 1)

  The sum over a response's tokens estimates KL(π‖π_ref) over responses, value and gradient, from
  samples of any π_old; token ratios alone keep the distribution of states at π_old's. The price
  is variance that grows with length and staleness. Exact with weights that do not depend on
  lengths: `sequence_sum`, `constant_length`, `token_sum`; with `token_mean` in the limit of large
  batches. First derivatives only, as in `unbiased`.

  Example:
    >>> rollout = Rollout(advantages=0, mask=jnp.ones(2), weights=jnp.ones(2))
    >>> log_ratio, ref_log_ratio = jnp.log(jnp.array([2.0, 2.0])), jnp.array([-1.0, -1.0])
    >>> print(sequence_unbiased(ref_log_ratio, log_ratio, rollout))
    [1.437 2.873]
  """
  # Written like `unbiased`: ρ_1⋯ρ_t moves with token t through the identity there, and with the
  # earlier tokens through `earlier`, whose terms all have one sign and cannot cancel.
  earlier = _segments.earlier(log_ratio, rollout.segment_ids)
  ratio = jnp.exp(bound(earlier + log_ratio))
  penalty = ratio * exp_excess(-ref_log_ratio)
  own = with_slope(penalty, ratio * ref_log_ratio, ref_log_ratio)
  return own + with_slope(jnp.zeros_like(penalty), penalty, earlier)


@slot_function(
  how="bind the KL: lambda _, log_ratio, rollout: sequence_exact(kl, log_ratio, rollout)"
)
def sequence_exact(kl: jax.Array, log_ratio: jax.Array, rollout: Rollout) -> jax.Array:
  """Computes the KL of responses from each token's KL over the whole vocabulary.

      ρ_1⋯ρ_t−1 KL_t

  Like `sequence_unbiased`, without the sampled token's noise. As an objective's divergence:
  `lambda _, log_ratio, rollout: sequence_exact(kl, log_ratio, rollout)`.

  Args:
    kl: KL(π‖π_ref) at each position, `[..., T]`, from `gpo.exact_kl`, with its gradient.
    log_ratio: d_t, `[..., T]`.
    rollout: its mask and segment_ids are used.

  Example:
    >>> rollout = Rollout(advantages=0, mask=jnp.ones(2, bool), weights=jnp.ones(2))
    >>> print(sequence_exact(jnp.array([0.1, 0.1]), jnp.log(jnp.array([2.0, 2.0])), rollout))
    [0.1 0.2]
  """
  earlier = _segments.earlier(log_ratio, rollout.segment_ids)
  return jnp.exp(bound(earlier)) * jnp.where(rollout.mask, kl, 0)  # kl never was at an entry


@slot_function(needs_reference=True)
def sequence_k3(ref_log_ratio: jax.Array, log_ratio: jax.Array, rollout: Rollout) -> jax.Array:
  """Computes `k3` of the whole response, at every token of it.

      e^−δ + δ − 1,   δ = Σ_t δ_t

  Example:
    >>> rollout = Rollout(advantages=0, mask=jnp.ones(2), weights=jnp.ones(2))
    >>> print(sequence_k3(jnp.array([-0.5, -0.5]), None, rollout))
    [0.718 0.718]

  Reference: DeepSeek-AI (2025, DeepSeek-R1), arXiv:2501.12948, the KL term over whole outputs.
  """
  return k3(bound(rollout.total(ref_log_ratio)), log_ratio, rollout)


@slot_function(tokenwise=True, needs_reference=True)
def chi2_minus_kl(ref_log_ratio: jax.Array, log_ratio: jax.Array, rollout: Rollout) -> jax.Array:
  """Computes the written specification's penalty.

      ρ(r − log r − 1),   r = π/π_ref

  Unbiased for χ²(π‖π_ref) − KL(π‖π_ref) for every π_old. Below r = 0.203 it rewards pushing a token
  further down; `unbiased` is the KL.

  Example:
    >>> print(chi2_minus_kl(jnp.array([1.0]), jnp.array([0.0]), None))
    [0.718]

  Reference: the module `gpo_jax.specification`.
  """
  del rollout
  return jnp.exp(log_ratio) * exp_excess(ref_log_ratio)


@slot_function(tokenwise=True, needs_reference=True)
def forward_kl(ref_log_ratio: jax.Array, log_ratio: jax.Array, rollout: Rollout) -> jax.Array:
  """Estimates KL(π_ref‖π) without bias, off-policy as well.

      (π_ref/π_old)(r − log r − 1),   r = π/π_ref

  The weight π_ref/π_old does not depend on the policy.

  Example:
    >>> print(forward_kl(jnp.array([1.0]), jnp.array([1.0]), None))
    [0.718]

  Reference: Schulman (2020), "Approximating KL divergence", with samples reweighted to π_ref.
  """
  del rollout
  weight = jnp.exp(bound(jax.lax.stop_gradient(log_ratio - ref_log_ratio)))
  return weight * exp_excess(ref_log_ratio)
