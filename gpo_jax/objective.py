"""The composable objective: an algorithm is a choice of functions for its slots.

loss = Σ_t weight_t (−factor_t surrogate(level(log_ratio))_t + β divergence_t)
"""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey

from gpo_jax import _checks, _segments
from gpo_jax._numerics import bound
from gpo_jax._slots import (
  as_data,
  as_slot,
  check_combination,
  check_numbers,
  describe,
  is_ours,
  name_of,
)
from gpo_jax.advantages import by_group, decoupled
from gpo_jax.types import (
  Advantage,
  Correction,
  Divergence,
  Level,
  Rollout,
  Surrogate,
  Terms,
  Weighting,
)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Objective:
  """A policy objective, put together from one function per slot.

      loss = Σ_t w_t (−factor_t · surrogate(level(log_ratio), A)_t + β · divergence_t)

  An objective is a pytree: the numbers bound to its functions (`functools.partial(clip,
  epsilon_low=0.1)`) and `beta` are leaves, its functions are structure. So a schedule compiles
  once, `jax.vmap` over objectives is a sweep and `jax.grad` through one gives meta-gradients: of
  `beta` and of the numbers of all slots but `advantage` and `weighting`, whose results are data and
  carry no gradient. Bind numbers and arrays only; a lambda closes over anything else. The
  loss's slots are traced, outside `jax.jit` too.

  Attributes:
    surrogate: `(log_ratio, advantages) -> objective`, to be maximised; see `gpo_jax.surrogates`.
    level: `(log_ratio, rollout) -> log_ratio`; see `gpo_jax.levels`.
    advantage: `(rewards, where) -> advantages`; see `gpo_jax.advantages`.
    weighting: `(mask, segment_ids) -> weights`; see `gpo_jax.weightings`.
    divergence: `(ref_log_ratio, log_ratio, rollout) -> penalty`; None for no reference policy.
    beta: the divergence's weight, a scalar; None with no divergence.
    corrections: `(log_probs, rollout) -> factor` each; see `gpo_jax.corrections`.
    allow_token_weighting: set it to weigh responses by length under a response's ratio, on purpose.

  Raises:
    ValueError: for a divergence without beta or the reverse, a slot that is no function or one that
      does not take what the slot calls it with, and a response-level ratio under a token-level
      weighting unless allowed.

  Example:
    >>> from functools import partial
    >>> import gpo_jax as gpo
    >>> objective = gpo.Objective(
    ...   surrogate=partial(gpo.surrogates.clip, epsilon_low=0.2),
    ...   level=gpo.levels.token,
    ...   advantage=gpo.advantages.center,
    ...   weighting=gpo.weightings.token_mean,
    ... )
    >>> rollout = objective.prepare(rewards=jnp.array([[1.0, 0.0]]), mask=jnp.ones((1, 2, 3)))
    >>> loss, terms = objective(jnp.full((1, 2, 3), -1.5), rollout)
    >>> print(loss, terms.gate[0, :, 0])
    0.0 [ 0.5 -0.5]
  """

  surrogate: Surrogate
  level: Level
  advantage: Advantage
  weighting: Weighting
  divergence: Divergence | None = None
  beta: chex.Numeric | None = None
  corrections: tuple[Correction, ...] = ()
  allow_token_weighting: bool = False

  def __post_init__(self):
    """Makes the slots leaves and structure."""
    for name in ("surrogate", "level", "advantage", "weighting", "divergence"):
      if name != "divergence" or self.divergence is not None:
        object.__setattr__(self, name, as_slot(name, getattr(self, name)))
    if callable(self.beta):
      raise ValueError("beta must be a number; got a function: pass beta=schedule(step)")
    object.__setattr__(self, "beta", as_data("beta", self.beta))
    given = self.corrections
    if not isinstance(given, tuple | list) or not all(map(callable, given)):
      raise ValueError(f"corrections must be a tuple of functions; got {given!r:.60}")
    corrections = tuple(as_slot("corrections", correction) for correction in given)
    object.__setattr__(self, "corrections", corrections)
    check_combination(self)

  def prepare(
    self,
    rewards: jax.Array,
    mask: jax.Array,
    old_log_probs: jax.Array | None = None,
    *,
    ref_log_probs: jax.Array | None = None,
    sampler_log_probs: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    group_ids: jax.Array | None = None,
  ) -> Rollout:
    """Computes advantages and weights, once, over all that one optimizer step sees.

    A response without an active token is left out of its group's statistics. A flat batch, rewards
    `[B]` and mask `[B, T]`, is one group of B: reshape it to `[P, G]` and `[P, G, T]`, or give
    `group_ids`. Advantages computed in another way, of responses or of tokens, replace those of the
    rollout: `rollout.replace(advantages=token_advantages)`, `[..., G, T]`.

    Args:
      rewards: `[..., G]`, G samples of one prompt along the last axis; of packed rows `[..., S]`,
        the reward of segment s of a row at s − 1, and anything where a row has fewer segments.
      mask: the tokens that count, `[..., G, T]`, bool or 0/1.
      old_log_probs: log π_old, `[..., G, T]`; None where that is the current policy.
      ref_log_probs: log π_ref, `[..., G, T]`; needed for a divergence.
      sampler_log_probs: log-probabilities from the sampler, `[..., G, T]`; needed by corrections.
      segment_ids: of packed rows, `[..., G, T]` integers: 1, 2, … in this order, which is not
        checked, and anything at masked tokens. An id that came back after another would be one
        response to advantages and two to weights and levels.
      group_ids: the prompt of each reward, integers of rewards' shape, for groups that are not the
        last axis: without it the segments of a packed row are one group.

    Returns:
      A `Rollout`, to be passed to the objective whole or cut along its row axes.

    Raises:
      ValueError: where shapes do not fit, or `advantage` or `weighting` returns another shape.

    Example:
      >>> import gpo_jax as gpo
      >>> ids, group_ids = jnp.array([[1, 1, 2, 2, 3, 0]]), jnp.array([[7, 7, 8]])
      >>> mask, rewards = ids > 0, jnp.array([[1.0, 0.0, 1.0]])  # a row of three responses
      >>> objective = gpo.dr_grpo(length=4)
      >>> rollout = objective.prepare(rewards, mask, segment_ids=ids, group_ids=group_ids)
      >>> print(rollout.advantages[mask])
      [ 0.5  0.5 -0.5 -0.5  0. ]
    """
    for name in ("advantage", "weighting"):
      check_numbers(name, getattr(self, name))
    mask = _checks.as_mask("mask", mask)
    if segment_ids is not None:
      segment_ids = _segments.fill(_checks.as_segment_ids(segment_ids, mask), mask)
    advantages = self._advantages(rewards, mask, segment_ids, group_ids)
    weights = self.weighting(mask, segment_ids)
    rollout = Rollout(
      advantages=_segments.to_tokens(advantages, segment_ids),
      mask=mask,
      weights=_checks.returned("weighting", weights, mask.shape, "token"),
      old_log_probs=old_log_probs,
      ref_log_probs=ref_log_probs,
      sampler_log_probs=sampler_log_probs,
      segment_ids=segment_ids,
    )
    return _checks.check_rollout(rollout)

  def _advantages(self, rewards, mask, segment_ids, group_ids) -> jax.Array:
    rewards = jnp.asarray(_checks.as_array("rewards", rewards))
    present = _segments.present(mask, segment_ids, (1, *rewards.shape)[-1])
    slot: Any = self.advantage
    # Several kinds of reward are for `decoupled`, or for a function from elsewhere that takes them.
    kinds = slot.func is decoupled or (group_ids is None and not is_ours(slot))
    first = max(rewards.ndim - present.ndim, 0) if kinds else 0
    if rewards.shape[first:] != present.shape:
      rows, packed = ", ".join(map(str, mask.shape[:-1])), segment_ids is not None
      raise ValueError(
        f"rewards must have one value per response, {f'[{rows}, S]' if packed else f'[{rows}]'} "
        f"for mask {list(mask.shape)}; got rewards {list(rewards.shape)}"
        + ("" if packed else ": rows that hold several responses need segment_ids")
      )
    if group_ids is not None:
      return by_group(slot, rewards, group_ids, present)
    return _checks.returned("advantage", slot(rewards, present), present.shape, "response")

  def __call__(self, log_probs: jax.Array, rollout: Rollout) -> tuple[jax.Array, Terms]:
    """Computes the loss, to be minimised, and the terms it is made of.

    Args:
      log_probs: log π of the sampled tokens under the current policy, `[..., G, T]`, floats.
      rollout: from `prepare`, whole or a cut of it.

    Returns:
      The scalar loss: over the cuts of a rollout the losses, and their gradients, add up. And
      `Terms`, per token, for `summarize`.

    Raises:
      ValueError: where shapes or dtypes do not fit, or the rollout lacks what a slot needs.
    """
    log_probs, rollout = _checks.clean(log_probs, rollout)
    if self.divergence is not None and rollout.ref_log_probs is None:
      raise ValueError(
        f"divergence={describe(self.divergence)} needs rollout.ref_log_probs: pass "
        "ref_log_probs= to prepare, or use an objective with divergence=None and beta=None"
      )
    for name in ("surrogate", "level", "divergence", "beta"):
      check_numbers(name, getattr(self, name))
    for correction in self.corrections:
      check_numbers("corrections", correction)
    slots = jax.tree.map(lambda leaf: jnp.asarray(leaf, log_probs.dtype), self)
    # To compute a token's slope anew is cheaper than to store and read what it needs, [..., G, T].
    return jax.checkpoint(_evaluate)(slots, log_probs, rollout)

  def replace(self, **slots: Any) -> "Objective":
    """Returns a copy with these slots replaced."""
    return dataclasses.replace(self, **slots)

  def __repr__(self) -> str:
    """Shows the expression that makes this objective."""
    fields = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
    slots = [f"{k}={describe(v)}" for k, v in fields if not (v is None or v is False)]
    return f"Objective({', '.join(slots)})".replace(", corrections=()", "")

  def tree_flatten_with_keys(self):
    """Splits the objective into its slots and its structure."""
    names = [field.name for field in dataclasses.fields(self)][:-1]
    children = [(GetAttrKey(name), getattr(self, name)) for name in names]
    return children, (tuple(names), self.allow_token_weighting)

  @classmethod
  def tree_unflatten(cls, structure, children) -> "Objective":
    """Puts the slots back as they are: JAX fills them with more than numbers."""
    names, allow_token_weighting = structure
    self = object.__new__(cls)
    slots = dict(zip(names, children, strict=True))
    for name, value in (slots | {"allow_token_weighting": allow_token_weighting}).items():
      object.__setattr__(self, name, value)
    return self


def check_objective(objective: Any) -> None:
  """Refuses what is no objective, such as a preset that was not called."""
  if not isinstance(objective, Objective):
    raise ValueError(
      f"objective must be an Objective; got {objective!r:.60}: call the preset, such as gpo.grpo()"
    )


def _evaluate(slots: Objective, log_probs: jax.Array, rollout: Rollout) -> tuple[jax.Array, Terms]:
  fixed = jax.lax.stop_gradient(log_probs)
  old_log_probs = fixed if rollout.old_log_probs is None else rollout.old_log_probs
  token_log_ratio = log_probs - old_log_probs
  log_ratio = slots.level(token_log_ratio, rollout)
  log_ratio = bound(_checks.like("level", log_ratio, token_log_ratio))
  token_log_ratio = bound(token_log_ratio)

  surrogate, gate = jax.jvp(
    lambda x: _checks.like("surrogate", slots.surrogate(x, rollout.advantages), x),
    (log_ratio,),
    (jnp.ones_like(log_ratio),),
  )
  loss, factor, divergence = -surrogate, None, None
  factors = [
    _checks.like(f"corrections: {name_of(correction)}", correction(fixed, rollout), fixed)
    for correction in slots.corrections
  ]
  factors += [] if rollout.factor is None else [rollout.factor]
  if factors:
    factor = functools.reduce(jnp.multiply, factors)
    loss = -factor * surrogate
  ref_log_probs, beta = rollout.ref_log_probs, slots.beta
  if slots.divergence is not None and ref_log_probs is not None and beta is not None:
    ref_log_ratio = bound(log_probs - ref_log_probs)
    divergence = slots.divergence(ref_log_ratio, token_log_ratio, rollout)
    loss = loss + beta * _checks.like("divergence", divergence, log_probs)

  terms = Terms(loss, surrogate, gate, log_ratio, token_log_ratio, divergence, factor)
  total = jnp.sum(jnp.where(rollout.mask, rollout.weights * loss, 0))
  return total, jax.lax.stop_gradient(terms)
