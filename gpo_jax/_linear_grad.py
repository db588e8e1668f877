"""Differentiates what comes from hidden states, by hand: a loop of unknown length has no reverse.

Each rule looks at what is differentiated, so that a frozen unembedding costs nothing. They are
jitted, because outside of `jax.jit` a `shard_map` does not support that look.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from gpo_jax import corrections, divergences, levels
from gpo_jax._linear import Gradients, Head, Slopes, Tiling, TokenLogProbs, sweep, vary
from gpo_jax._slots import is_ours
from gpo_jax.objective import Objective
from gpo_jax.types import Rollout, Terms

# What a term of the loss may be made of for its slope to depend on its own token alone.
_TOKEN_FUNCTIONS = (
  levels.token,
  divergences.k1,
  divergences.k2,
  divergences.k3,
  divergences.absolute,
  divergences.straight_through,
  divergences.unbiased,
  divergences.chi2_minus_kl,
  divergences.forward_kl,
  corrections.truncate_importance,
  corrections.mask_importance,
  corrections.total_variation_mask,
  corrections.binary_kl_mask,
)


def is_token_local(objective: Objective) -> bool:
  """Tells whether each token's slope depends on that token alone."""
  slots: list[Any] = [objective.level, *objective.corrections]
  slots += [] if objective.divergence is None else [objective.divergence]
  slots += [slot.keywords["level"] for slot in slots if "level" in slot.keywords]
  numbers = all(jnp.ndim(leaf) == 0 for leaf in jax.tree.leaves(objective))
  # A surrogate from elsewhere may close over an array of tokens, which chunks do not cut.
  return numbers and is_ours(objective.surrogate) and all(s.func in _TOKEN_FUNCTIONS for s in slots)


def _evaluate(
  objective: Objective, outputs: TokenLogProbs, rollout: Rollout
) -> tuple[jax.Array, Terms]:
  loss, terms = objective(outputs.log_probs, rollout)
  return loss, dataclasses.replace(terms, entropy=jax.lax.stop_gradient(outputs.entropy))


@jax.custom_jvp
def _first_order(tree: Any) -> Any:
  return tree


@_first_order.defjvp
def _refuse(primals: tuple, tangents: tuple):
  raise NotImplementedError(
    "linear_loss and linear_token_log_probs have first derivatives only; for others use "
    "token_log_probs(hidden @ unembedding.T, tokens)"
  )


def _open(arguments: tuple) -> tuple[tuple, Gradients]:
  """Takes the arguments of a forward rule apart: their values, and zeros for the gradients."""
  values = jax.tree.map(lambda leaf: leaf.value, arguments)
  moved = jax.tree.map(lambda leaf: leaf.perturbed, arguments)
  (hidden, head, *_), (hidden_moved, head_moved, *_) = values, moved
  if head_moved.temperature or head_moved.softcap:
    raise NotImplementedError(
      "temperature and softcap are not differentiable here; use "
      "token_log_probs(hidden @ unembedding.T, tokens)"
    )
  dtype = head.temperature.dtype
  return values, Gradients(
    jnp.zeros_like(hidden) if hidden_moved else None,
    jnp.zeros_like(head.unembedding, dtype) if head_moved.unembedding else None,
    jnp.zeros_like(head.bias, dtype) if head_moved.bias else None,
  )


def _close(gradients: Gradients, hidden: jax.Array, head: Head) -> tuple[jax.Array, Head]:
  """Gives gradients the dtypes of what they belong to; zeros, which nobody reads, for none.

  The structure is then always the same: JAX 0.8 cannot trace a rule again that changes its own.
  """

  def close(d: jax.Array | None, x: Any) -> Any:
    return x if x is None else jnp.zeros_like(x) if d is None else d.astype(x.dtype)

  d_hidden, d_unembedding, d_bias = _first_order(gradients)
  constant: Any = None  # softcap and temperature
  return close(d_hidden, hidden), Head(
    close(d_unembedding, head.unembedding), close(d_bias, head.bias), constant, constant
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_probs(tiling, hidden, head, tokens, mask):
  return sweep(hidden, head, tokens, mask, tiling)[0]


def _log_probs_fwd(tiling, *arguments):
  values, zeros = _open(arguments)
  hidden, head, tokens, mask = values
  return _first_order(sweep(hidden, head, tokens, mask, tiling)[0]), (values, zeros)


def _log_probs_bwd(tiling, residuals, slopes):
  (hidden, head, tokens, mask), zeros = residuals
  d_log_probs, d_entropy = slopes
  if isinstance(d_log_probs, SymbolicZero):
    d_log_probs = jnp.zeros_like(tokens, head.temperature.dtype)
  slopes = Slopes(d_log_probs, None if isinstance(d_entropy, SymbolicZero) else d_entropy)

  def of_chunk(take: Callable, _: TokenLogProbs) -> Slopes:
    return jax.tree.map(take, slopes)

  _, gradients = sweep(hidden, head, tokens, mask, tiling, of_chunk, zeros)
  return *_close(gradients, hidden, head), None, None


_log_probs.defvjp(_log_probs_fwd, _log_probs_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _local_loss(tiling, hidden, head, tokens, objective, rollout):
  outputs, _ = sweep(hidden, head, tokens, rollout.mask, tiling)
  return _evaluate(objective, outputs, rollout)


def _local_loss_fwd(tiling, *arguments):
  (hidden, head, tokens, objective, rollout), zeros = _open(arguments)
  advantages = jnp.broadcast_to(rollout.advantages, rollout.mask.shape)
  per_token = rollout.replace(advantages=advantages, segment_ids=None)

  def slopes(take: Callable, outputs: TokenLogProbs) -> Slopes:
    rollout = jax.tree.map(take, per_token)
    return Slopes(jax.grad(lambda x: objective(x, rollout)[0])(outputs.log_probs), None)

  outputs, gradients = sweep(hidden, head, tokens, rollout.mask, tiling, slopes, zeros)
  loss_and_terms, d_objective = jax.value_and_grad(
    lambda slots: _evaluate(slots, outputs, rollout), has_aux=True
  )(objective)
  return _first_order(loss_and_terms), (*_close(gradients, hidden, head), d_objective)


def _local_loss_bwd(tiling, residuals, slopes):
  slope, _ = slopes
  if isinstance(slope, SymbolicZero):
    slope = jnp.zeros(slope.shape, jnp.float32)
  scaled = jax.tree.map(lambda x: slope.astype(x.dtype) * x, residuals)
  d_hidden, d_head, d_objective = _first_order(scaled)
  return d_hidden, d_head, None, d_objective, None


_local_loss.defvjp(_local_loss_fwd, _local_loss_bwd, symbolic_zeros=True)


@functools.partial(jax.jit, static_argnums=0)
def log_probs(
  tiling: Tiling, hidden: jax.Array, head: Head, tokens: jax.Array, mask: jax.Array
) -> TokenLogProbs:
  """Computes log-probabilities and entropies."""
  return _log_probs(tiling, *vary((hidden, head, tokens, mask)))


@functools.partial(jax.jit, static_argnums=0)
def loss(
  tiling: Tiling,
  hidden: jax.Array,
  head: Head,
  tokens: jax.Array,
  objective: Objective,
  rollout: Rollout,
) -> tuple[jax.Array, Terms]:
  """Computes an objective's loss and terms, in one pass where a token's slope is its own affair."""
  if is_token_local(objective):
    return _local_loss(tiling, *vary((hidden, head, tokens, objective, rollout)))
  return _evaluate(objective, log_probs(tiling, hidden, head, tokens, rollout.mask), rollout)
