"""Log-probabilities of the sampled tokens, from logits or from hidden states.

`token_log_probs`, `token_entropy` and `exact_kl` take logits `[..., T, V]`. Their `linear_` forms
take hidden states `[..., T, H]` and the unembedding `[V, H]` and hold the logits of one chunk of
tokens at a time; `linear_loss` goes on to the loss and, when differentiated, has the gradients of
most objectives from the same pass.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from gpo_jax import _checks, _linear_grad
from gpo_jax._linear import (
  Head,
  Tiling,
  TokenLogProbs,
  accumulator,
  all_logits,
  is_explicit,
)
from gpo_jax.objective import Objective, check_objective
from gpo_jax.types import Rollout, Terms


def _scale(
  logits: jax.Array,
  where: jax.Array | None,
  temperature: chex.Numeric,
  softcap: chex.Numeric | None,
  name: str = "logits",
) -> jax.Array:
  """Gives logits as they enter the softmax, float32 at least; the lowest number outside `where`."""
  (logits,) = _checks.promote(_checks.as_array(name, logits))
  if not logits.ndim or 0 in logits.shape:
    raise ValueError(
      f"{name} must be [..., T, V] with every axis at least 1; got {list(logits.shape)}"
    )
  if where is not None:
    where = _as_support(where, logits, name)
    logits = jnp.where(where, logits, 0)  # what may be NaN must not meet a function with a slope
  if softcap is not None:
    softcap = jnp.asarray(_checks.as_scalar("softcap", softcap), logits.dtype)
    logits = softcap * jnp.tanh(logits / softcap)
  logits = logits / jnp.asarray(_checks.as_scalar("temperature", temperature), logits.dtype)
  return logits if where is None else jnp.where(where, logits, jnp.finfo(logits.dtype).min)


def _as_support(where: Any, logits: jax.Array, name: str) -> jax.Array:
  where = jnp.asarray(_checks.as_array("where", where)).astype(bool)
  if where.ndim > logits.ndim or any(
    size not in (1, full) for size, full in zip(where.shape[::-1], logits.shape[::-1], strict=False)
  ):
    raise ValueError(
      "where must broadcast to the logits, a mask of the vocabulary; got "
      f"{_checks.describe(**{'where': where, name: logits})}. "
      "For a mask of tokens give mask[..., None]"
    )
  return jnp.expand_dims(where, range(logits.ndim - where.ndim))


def _as_tokens(tokens: Any, shape: tuple[int, ...], of: str) -> jax.Array:
  tokens = _checks.as_ids("tokens", tokens, "give the ids of the sampled tokens")
  if tokens.shape != shape:
    raise ValueError(
      f"tokens must be one per position, {list(shape)} for {of}; got {list(tokens.shape)}: shift "
      "them so that position t holds the token sampled from it"
    )
  return tokens


def token_log_probs(
  logits: jax.Array,
  tokens: jax.Array,
  *,
  temperature: chex.Numeric = 1.0,
  where: jax.Array | None = None,
  softcap: chex.Numeric | None = None,
) -> jax.Array:
  """Computes log-probabilities of the sampled tokens from logits.

      log π_t = z_{y_t} − log Σ_v exp(z_v),   z = softcap(logits) / temperature

  For a policy sampled at a temperature, or from a top-k or top-p support, give the same ones here:
  then these are the log-probabilities that it sampled from.

  Args:
    logits: `[..., T, V]`, of any float dtype; computed in float32 at least.
    tokens: the sampled tokens, `[..., T]` integers in [0, V). An id outside gives NaN.
    temperature: > 0.
    where: the support, bools that broadcast to the logits: probabilities are renormalised over it,
      and a token outside it is −inf. `mask[..., None]` keeps what padded logits hold, NaN too, out
      of the gradient.
    softcap: c > 0 for logits c·tanh(logits/c); None for none.

  Returns:
    Log-probabilities ≤ 0, `[..., T]`.

  Raises:
    ValueError: where shapes or dtypes do not fit.

  Example:
    >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    >>> print(token_log_probs(logits, jnp.array([0, 2])))
    [-0.693 -0.223]
    >>> print(token_log_probs(logits, jnp.array([0, 2]), where=jnp.array([True, True, False])))
    [-0.405   -inf]
  """
  logits = _scale(logits, where, temperature, softcap)
  tokens = _as_tokens(tokens, logits.shape[:-1], f"logits {list(logits.shape)}")
  # A negative id is outside too; NumPy's convention would wrap it around.
  index = jnp.where(tokens < 0, logits.shape[-1], tokens)[..., None]
  logit = jnp.take_along_axis(logits, index, axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]
  # Both terms less the largest logit: their difference keeps its digits however large logits are.
  largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  log_probs = logit - largest[..., 0] - jnp.log(jnp.sum(jnp.exp(logits - largest), axis=-1))
  return jnp.where(logit == jnp.finfo(logits.dtype).min, -jnp.inf, log_probs)


def token_entropy(
  logits: jax.Array,
  *,
  temperature: chex.Numeric = 1.0,
  where: jax.Array | None = None,
  softcap: chex.Numeric | None = None,
) -> jax.Array:
  """Computes the entropy of the policy at each position.

      H_t = −Σ_v p_v log p_v,   p = softmax(softcap(logits) / temperature)

  Args:
    logits: `[..., T, V]`, of any float dtype; −inf for a token of probability 0.
    temperature: > 0.
    where: the support, bools that broadcast to the logits.
    softcap: c > 0 for logits c·tanh(logits/c); None for none.

  Returns:
    Entropies in nats, `[..., T]`, in [0, log V] up to rounding.

  Raises:
    ValueError: where shapes or dtypes do not fit.

  Example:
    >>> print(token_entropy(jnp.array([[0.0, 0.0], [0.0, -jnp.inf]])))
    [0.693 0.   ]
  """
  probs, log_probs = _distribution(_scale(logits, where, temperature, softcap))
  return jnp.sum(probs * -log_probs, axis=-1)


def _distribution(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Gives probabilities and their logarithms, 0 where the probability is 0."""
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  probs = jnp.exp(log_probs)
  return probs, jnp.where(probs > 0, log_probs, 0)


def exact_kl(
  logits: jax.Array,
  ref_logits: jax.Array,
  *,
  temperature: chex.Numeric = 1.0,
  where: jax.Array | None = None,
  softcap: chex.Numeric | None = None,
) -> jax.Array:
  """Computes KL(π‖π_ref) at each position from both distributions, without sampling noise.

      KL_t = Σ_v p_v (log p_v − log q_v)

  As an objective's divergence, close over it: `objective.replace(divergence=lambda *_: kl)`. That
  leaves the states' distribution at π_old's; `divergences.sequence_exact` weighs it so that the sum
  over a response is the KL of responses, off-policy too.

  Args:
    logits: of the policy, `[..., T, V]`, of any float dtype.
    ref_logits: of the reference policy, of the same shape; no gradient flows to them.
    temperature: > 0, for both.
    where: the support, bools that broadcast to the logits, for both.
    softcap: c > 0 for logits c·tanh(logits/c), for both; None for none.

  Returns:
    Divergences in nats, `[..., T]`, ≥ 0 up to rounding; inf where π_ref excludes what π does not.

  Raises:
    ValueError: where shapes or dtypes do not fit.

  Example:
    >>> print(exact_kl(jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))))
    [0.144]

  Reference: "Rao-Blackwellised" estimation of the KL, as in Amini et al. (2025), arXiv:2504.10637.
  """
  scaled = _scale(logits, where, temperature, softcap)
  reference = _scale(ref_logits, where, temperature, softcap, "ref_logits")
  _checks.like_first(logits=scaled, ref_logits=reference)
  return _kl(scaled, reference)


def _kl(logits: jax.Array, ref_logits: jax.Array) -> jax.Array:
  probs, log_probs = _distribution(logits)
  ref_log_probs = jax.nn.log_softmax(jax.lax.stop_gradient(ref_logits), axis=-1)
  return jnp.sum(probs * jnp.where(probs > 0, log_probs - ref_log_probs, 0), axis=-1)


def linear_token_log_probs(
  hidden: jax.Array,
  unembedding: jax.Array,
  tokens: jax.Array,
  *,
  mask: jax.Array | None = None,
  temperature: chex.Numeric = 1.0,
  bias: jax.Array | None = None,
  softcap: chex.Numeric | None = None,
  chunk_size: int | None = None,
  tile_size: int | None = None,
  compact: bool | None = None,
) -> TokenLogProbs:
  """Computes log-probabilities and entropies from hidden states; `[..., T, V]` is never formed.

      log π_t = z_{y_t} − log Σ_v exp(z_v),   z = softcap(h_t Wᵀ + b) / temperature

  Differentiable, once, in hidden, unembedding and bias, through entropies too. The backward pass
  computes the logits anew: four matrix products of tokens × V × H instead of three.

  Sharding: arrays may be sharded over the axes before T on Auto and Explicit meshes, with
  `compact=False`, the default on Explicit ones; over any axis of tokens under `jax.shard_map` with
  every option. The unembedding may be sharded over V on Auto and Explicit meshes with
  `tile_size=V`, the default on Explicit ones.

  Args:
    hidden: h, the last hidden states, `[..., T, H]` floats; products are of this dtype (of the
      wider of it and the unembedding's), sums are float32 at least.
    unembedding: W, `[V, H]`.
    tokens: the sampled tokens, `[..., T]` integers in [0, V). An id outside gives NaN.
    mask: the tokens that count, `[..., T]`; None for all. The others get 0, and may hold anything.
    temperature: > 0, not differentiable.
    bias: b, `[V]`; −inf bans a token, without a softcap.
    softcap: c > 0 for logits c·tanh(logits/c), not differentiable; None for none.
    chunk_size: how many tokens at a time; 4·chunk_size·V bytes are held. 512 if None. Unless
      compact, a chunk is at least one position of every row.
    tile_size: how many entries of the vocabulary at a time; 1024 on CPU, V elsewhere if None.
    compact: whether to skip masked tokens by gathering the others; on CPU if None.

  Returns:
    `TokenLogProbs(log_probs, entropy)`, `[..., T]` each, in nats.

  Raises:
    ValueError: where shapes or dtypes do not fit.
    NotImplementedError: for second derivatives.

  Example:
    >>> hidden, unembedding = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0], [0.0, 2.0]])
    >>> outputs = linear_token_log_probs(hidden, unembedding, jnp.array([0]))
    >>> print(outputs.log_probs, outputs.entropy)
    [-0.693] [0.693]
  """
  hidden, head = _as_head(hidden, unembedding, bias, softcap, temperature)
  tokens = _as_tokens(tokens, hidden.shape[:-1], f"hidden {list(hidden.shape)}")
  mask = jnp.ones_like(tokens, bool) if mask is None else _checks.as_mask("mask", mask)
  _checks.like_first(tokens=tokens, mask=mask)
  tiling = _tiling(hidden, head, chunk_size, tile_size, compact)
  return _linear_grad.log_probs(tiling, hidden, head, tokens, mask)


def linear_loss(
  objective: Objective,
  hidden: jax.Array,
  unembedding: jax.Array,
  tokens: jax.Array,
  rollout: Rollout,
  *,
  temperature: chex.Numeric = 1.0,
  bias: jax.Array | None = None,
  softcap: chex.Numeric | None = None,
  chunk_size: int | None = None,
  tile_size: int | None = None,
  compact: bool | None = None,
) -> tuple[jax.Array, Terms]:
  """Computes an objective's loss from hidden states: `objective(log_probs, rollout)`, in less.

  An objective is a sum over tokens with fixed weights. Where a token's term depends on that token
  alone, its gradient is known as soon as its logits are, and one pass computes both, three matrix
  products of tokens × V × H in all, as if the logits were kept. Objectives with a ratio of
  responses, a divergence of them, or a function from elsewhere take the two passes of
  `linear_token_log_probs` by themselves.

  Args:
    objective: the objective; its numbers are differentiable too.
    hidden: h, `[..., T, H]`; see `linear_token_log_probs` for this and all that follows.
    unembedding: W, `[V, H]`.
    tokens: the sampled tokens, `[..., T]` integers in [0, V).
    rollout: from `objective.prepare`; its mask says which tokens count.
    temperature: > 0, not differentiable.
    bias: b, `[V]`.
    softcap: c > 0, not differentiable; None for none.
    chunk_size: how many tokens at a time.
    tile_size: how many entries of the vocabulary at a time.
    compact: whether to skip masked tokens by gathering the others.

  Returns:
    The loss and its terms, as `objective(log_probs, rollout)` returns them, and the entropy of each
    token as `terms.entropy`, without gradient.

  Raises:
    ValueError: where shapes or dtypes do not fit.
    NotImplementedError: for second derivatives.

  Example:
    >>> import gpo_jax as gpo
    >>> objective = gpo.dapo()
    >>> rollout = objective.prepare(jnp.array([[1.0, 0.0]]), jnp.ones((1, 2, 1)))
    >>> hidden, tokens = jnp.array([[[[1.0, 0.0]], [[0.0, 1.0]]]]), jnp.array([[[0], [1]]])
    >>> grad = jax.grad(lambda w: linear_loss(objective, hidden, w, tokens, rollout)[0])
    >>> print(grad(jnp.zeros((2, 2))))
    [[-0.177 -0.177]
     [ 0.177  0.177]]
  """
  check_objective(objective)
  rollout = _checks.check_rollout(rollout)
  hidden, head = _as_head(hidden, unembedding, bias, softcap, temperature)
  tokens = _as_tokens(tokens, hidden.shape[:-1], f"hidden {list(hidden.shape)}")
  _checks.like_first(tokens=tokens, mask=rollout.mask)
  tiling = _tiling(hidden, head, chunk_size, tile_size, compact)
  return _linear_grad.loss(tiling, hidden, head, tokens, objective, rollout)


def linear_exact_kl(
  hidden: jax.Array,
  unembedding: jax.Array,
  ref_hidden: jax.Array,
  ref_unembedding: jax.Array,
  *,
  mask: jax.Array | None = None,
  temperature: chex.Numeric = 1.0,
  bias: jax.Array | None = None,
  ref_bias: jax.Array | None = None,
  softcap: chex.Numeric | None = None,
  chunk_size: int = 256,
) -> jax.Array:
  """Computes `exact_kl` from the hidden states of both policies, chunk by chunk.

  Args:
    hidden: h of the policy, `[..., T, H]`.
    unembedding: W of the policy, `[V, H]`.
    ref_hidden: h of the reference policy, `[..., T, H']`; no gradient flows to it.
    ref_unembedding: W of the reference policy, `[V, H']`; no gradient flows to it.
    mask: the tokens that count, `[..., T]`; None for all. The others get 0, and may hold anything.
    temperature: > 0, for both.
    bias: b of the policy, `[V]`.
    ref_bias: b of the reference policy, `[V]`.
    softcap: c > 0 for logits c·tanh(logits/c), for both; None for none.
    chunk_size: how many tokens at a time, at least one position of every row; several
      `[chunk_size, V]` are held.

  Returns:
    Divergences in nats, `[..., T]`, ≥ 0 up to rounding.

  Raises:
    ValueError: where shapes or dtypes do not fit.

  Example:
    >>> hidden, w = jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> print(linear_exact_kl(hidden, w, jnp.zeros((1, 2)), w))
    [0.111]
  """
  hidden, head = _as_head(hidden, unembedding, bias, softcap, temperature)
  ref_hidden, ref_head = _as_head(
    ref_hidden, ref_unembedding, ref_bias, softcap, temperature, "ref_"
  )
  states = ((hidden, head), (ref_hidden, ref_head))
  shapes = [(*x.shape[:-1], w.unembedding.shape[0]) for x, w in states]
  if shapes[0] != shapes[1]:
    raise ValueError(
      "hidden and ref_hidden, unembedding and ref_unembedding must make logits of one shape; got "
      f"{list(shapes[0])} and {list(shapes[1])}"
    )
  _check_size("chunk_size", chunk_size)
  mask = jnp.ones(hidden.shape[:-1], bool) if mask is None else _checks.as_mask("mask", mask)
  _checks.like_first(hidden=hidden[..., 0], mask=mask)

  def of_position(x: tuple[jax.Array, jax.Array]) -> jax.Array:
    return _kl(all_logits(x[0], head), all_logits(x[1], ref_head))

  positions = [
    jnp.moveaxis(jnp.where(jnp.expand_dims(mask, -1), x, 0), -2, 0) for x in (hidden, ref_hidden)
  ]
  batch_size = max(1, min(chunk_size * mask.shape[-1] // mask.size, mask.shape[-1]))
  kl = jax.lax.map(jax.checkpoint(of_position), tuple(positions), batch_size=batch_size)
  return jnp.where(mask, jnp.moveaxis(kl, 0, -1), 0)


def _as_head(
  hidden: Any, unembedding: Any, bias: Any, softcap: Any, temperature: Any, of: str = ""
) -> tuple[jax.Array, Head]:
  """Converts what makes logits; `of` is what the arguments' names begin with."""
  hidden = jnp.asarray(_checks.as_array(f"{of}hidden", hidden))
  unembedding = jnp.asarray(_checks.as_array(f"{of}unembedding", unembedding))
  got = _checks.describe(**{f"{of}hidden": hidden, f"{of}unembedding": unembedding})
  fits = hidden.ndim > 1 and unembedding.ndim == 2 and hidden.shape[-1] == unembedding.shape[1]
  if not fits or 0 in hidden.shape + unembedding.shape:
    raise ValueError(
      f"{of}hidden must be [..., T, H] and {of}unembedding [V, H], every axis at least 1; got {got}"
      ": transpose a kernel [H, V]"
    )
  if bias is not None:
    bias = jnp.asarray(_checks.as_array(f"{of}bias", bias))
    if bias.shape != unembedding.shape[:1]:
      raise ValueError(f"{of}bias must be [V]; got {list(bias.shape)} with {got}")
  dtype = accumulator(hidden.dtype, unembedding.dtype)
  if softcap is not None:
    softcap = jnp.asarray(_checks.as_scalar("softcap", softcap), dtype)
  temperature = jnp.asarray(_checks.as_scalar("temperature", temperature), dtype)
  return hidden, Head(unembedding, bias, softcap, temperature)


def _check_size(name: str, size: Any) -> None:
  if not isinstance(size, int | np.integer) or size < 1:
    raise ValueError(f"{name} must be an integer of at least 1; got {size!r:.60}")


def _tiling(
  hidden: jax.Array,
  head: Head,
  chunk_size: int | None,
  tile_size: int | None,
  compact: bool | None,
) -> Tiling:
  """Chooses what the user did not: small tiles and compact chunks were measured on CPU only."""
  vocabulary = head.unembedding.shape[0]
  sharded = is_explicit(hidden) or is_explicit(head.unembedding)
  simple = sharded or jax.default_backend() != "cpu"
  for name, size in {"chunk_size": chunk_size, "tile_size": tile_size}.items():
    if size is not None:
      _check_size(name, size)
  if compact and sharded:
    raise ValueError("compact must be False on a mesh with Explicit axes, where tokens stay put")
  return Tiling(
    chunk_size=int(chunk_size or 512),
    tile_size=int(min(tile_size or (vocabulary if simple else 1024), vocabulary)),
    compact=not simple if compact is None else bool(compact),
  )
