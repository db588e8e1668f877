"""The composable objective: an algorithm is a choice of functions for its slots.

loss = Σ_t weight_t (−factor_t surrogate(level(log_ratio))_t + β divergence_t)
"""

import dataclasses
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey

from gpo_jax import _segments
from gpo_jax._inputs import as_array, as_filled_ids, as_mask, check_returned
from gpo_jax._padding import validate
from gpo_jax._ranges import check_range
from gpo_jax._slots import as_number, as_slot, check_combination, check_numbers, describe
from gpo_jax.advantages import by_group
from gpo_jax.evaluation import call, enter, evaluate, evaluate_terms, run
from gpo_jax.traits import traits_of
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
  once, `jax.vmap` over objectives is a sweep and `jax.grad` through one computes meta-gradients: of
  `beta` and of the numbers of all slots but `advantage` and `weighting`, whose results are data and
  carry no gradient. Bind numbers and arrays only, and close over anything else in a lambda. Outside
  of `jax.jit` the package's functions are compiled once; functions of your own run operation by
  operation, and see the current values of what they close over.

  Attributes:
    surrogate: a `Surrogate`, maximised; see `gpo_jax.surrogates`.
    level: a `Level`; see `gpo_jax.levels`.
    advantage: an `Advantage`; see `gpo_jax.advantages`. None if `prepare` does not compute them: a
      critic supplies them (`ppo`), or none are needed (`distill`).
    weighting: a `Weighting`; see `gpo_jax.weightings`.
    divergence: a `Divergence`, minimised, or None; see `gpo_jax.divergences`.
    beta: the divergence's weight, a scalar; None without a divergence.
    corrections: a tuple, each a `Correction`; see `gpo_jax.corrections`.
    allow_token_weighting: whether a response's ratio may be weighted by the response's length.

  Raises:
    ValueError: for a divergence without beta or the reverse, a slot that is not a function or does
      not take what the slot calls it with, and a response-level ratio under a token-level weighting
      unless allowed.

  Example:
    >>> from functools import partial
    >>> import gpo_jax as gpo
    >>> objective = gpo.Objective(
    ...   surrogate=partial(gpo.surrogates.clip, epsilon_low=0.2),
    ...   level=gpo.levels.token,
    ...   advantage=gpo.advantages.center,
    ...   weighting=gpo.weightings.token_mean,
    ... )
    >>> rollout = objective.prepare(rewards=jnp.array([[1.0, 0.0]]), mask=jnp.ones((1, 2, 4)))
    >>> loss, terms = objective(jnp.full((1, 2, 4), -1.5), rollout)
    >>> print(loss, terms.gate[0, :, 0])
    0.0 [ 0.5 -0.5]
  """

  surrogate: Surrogate
  level: Level
  advantage: Advantage | None
  weighting: Weighting
  divergence: Divergence | None = None
  beta: chex.Numeric | None = None
  corrections: tuple[Correction, ...] = ()
  allow_token_weighting: bool = False
  _structure: ClassVar[Any]  # of the slots, numbers taken out; set for each instance

  def __post_init__(self):
    """Makes the slots leaves and structure."""
    for name in ("surrogate", "level", "advantage", "weighting", "divergence"):
      if getattr(self, name) is not None or name not in ("advantage", "divergence"):
        object.__setattr__(self, name, as_slot(name, getattr(self, name)))
    if callable(self.beta):
      raise ValueError("beta must be a number; got a function: pass beta=schedule(step)")
    if self.beta is not None:
      beta = check_range("beta", as_number("beta", self.beta))
      object.__setattr__(self, "beta", jnp.asarray(beta, float))
    given = self.corrections
    if not isinstance(given, tuple | list) or not all(map(callable, given)):
      raise ValueError(f"corrections must be a tuple of functions; got {given!r:.60}")
    corrections = tuple(as_slot("corrections", correction) for correction in given)
    object.__setattr__(self, "corrections", corrections)
    check_combination(self)
    object.__setattr__(self, "_structure", jax.tree.structure(self._slots()))

  def prepare(
    self,
    rewards: jax.Array | None = None,
    mask: jax.Array | None = None,
    old_log_probs: jax.Array | None = None,
    *,
    advantages: jax.Array | None = None,
    ref_log_probs: jax.Array | None = None,
    sampler_log_probs: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    group_ids: jax.Array | None = None,
  ) -> Rollout:
    """Computes advantages and weights, once, over the data of one optimizer step.

    A fully masked response is left out of its group's statistics.

    Args:
      rewards: `[..., G]`, G samples of one prompt along the last axis; for packed rows `[..., S]`,
        the reward of segment s of a row at s − 1; unused entries may hold anything.
      mask: the tokens that count, `[..., G, T]`, bool or 0/1.
      old_log_probs: log π_old, `[..., G, T]`; None if that is the current policy.
      advantages: in place of rewards, of responses (of the shape of rewards, or `[..., G, 1]`) or
        of tokens, `[..., G, T]`; an array of the mask's shape is per token. An objective with a
        divergence and no advantage function needs neither: advantages are 0 then, and the
        divergence alone is minimised.
      ref_log_probs: log π_ref, `[..., G, T]`; a divergence from a reference policy needs it.
      sampler_log_probs: log-probabilities from the sampler, `[..., G, T]`; importance weights and
        `reject` need it, masks of drift compare with it if it is given.
      segment_ids: of packed rows, `[..., G, T]` integers: 1, 2, … in this order, and anything at
        masked tokens. Where values are known, ids below 1 and decreasing ones raise.
      group_ids: the prompt of each reward, integers of rewards' shape, for groups that are not the
        last axis: without it the segments of a packed row are one group.

    Returns:
      A `Rollout`, to be passed to the objective whole or sliced along its row axes.

    Raises:
      ValueError: if shapes do not fit; if `advantage` or `weighting` returns another shape; for
        rewards of rank 1 without `group_ids`, which would be one group; and for groups of one under
        an advantage relative to the group, which would all be 0.

    Example:
      >>> import gpo_jax as gpo
      >>> ids, group_ids = jnp.array([[1, 1, 2, 2, 3, 0]]), jnp.array([[7, 7, 8]])
      >>> mask, rewards = ids > 0, jnp.array([[1.0, 0.0, 1.0]])  # a row of three responses
      >>> objective = gpo.dr_grpo(length=4)
      >>> rollout = objective.prepare(rewards, mask, segment_ids=ids, group_ids=group_ids)
      >>> print(rollout.advantages[mask])
      [ 0.5  0.5 -0.5 -0.5  0. ]
    """
    given = [x is not None for x in (rewards, advantages)]
    alone = self.advantage is None and self.divergence is not None
    if all(given) or not (any(given) or alone):
      got = "both" if all(given) else "neither"
      raise ValueError(f"prepare needs rewards or advantages, one of the two; got {got}")
    mask = as_mask("mask", mask)
    if not any(given):
      advantages = jnp.zeros_like(mask, float)
    segment_ids = as_filled_ids(segment_ids, mask)
    of_rewards = rewards is not None
    if of_rewards:
      advantages = self._advantages(rewards, mask, segment_ids, group_ids)
    elif group_ids is not None:
      raise ValueError("group_ids go with rewards; got advantages, which need no groups")
    advantages = jnp.asarray(as_array("advantages", advantages))
    # A packed row may have as many rewards as tokens: its rewards are of responses all the same.
    if of_rewards or advantages.shape != mask.shape:
      advantages = _segments.to_tokens(advantages, segment_ids)
    check_numbers(self.weighting)
    weights = call(self.weighting, mask, segment_ids)
    rollout = Rollout(
      advantages=advantages,
      mask=mask,
      weights=check_returned("weighting", weights, mask.shape, "token"),
      old_log_probs=old_log_probs,
      ref_log_probs=ref_log_probs,
      sampler_log_probs=sampler_log_probs,
      segment_ids=segment_ids,
    )
    return validate(rollout)

  def _advantages(self, rewards, mask, segment_ids, group_ids) -> jax.Array:
    if self.advantage is None:
      raise ValueError(
        "the objective has no advantage function for rewards: pass advantages= to prepare, such as "
        "advantages.generalized(rewards, values, mask), or use replace(advantage=...)"
      )
    check_numbers(self.advantage)
    rewards = jnp.asarray(as_array("rewards", rewards))
    present = _segments.present(mask, segment_ids, (1, *rewards.shape)[-1])
    _check_kinds(self.advantage, rewards, mask, present, segment_ids, group_ids)
    if group_ids is not None:
      return by_group(self.advantage, rewards, group_ids, present)
    _check_groups(self.advantage, rewards, present)
    advantages = call(self.advantage, rewards, present)
    return check_returned("advantage", advantages, present.shape, "response")

  def __call__(self, log_probs: jax.Array, rollout: Rollout) -> tuple[jax.Array, Terms]:
    """Computes the loss, minimised, and the terms it is made of.

    Args:
      log_probs: log π of the sampled tokens under the current policy, `[..., G, T]`, floats.
      rollout: from `prepare`, whole or any slice of it.

    Returns:
      The scalar loss, and `Terms`, per token, for `summarize`. Over the slices of a rollout losses
      and gradients add up.

    Raises:
      ValueError: if shapes or dtypes do not fit, or the rollout lacks what a slot needs.
    """
    return run(evaluate, *enter(self, log_probs, rollout))

  def losses(self, log_probs: jax.Array, rollout: Rollout) -> jax.Array:
    """Computes the loss of each token, unweighted, for a trainer with its own reduction.

        losses_t = −factor_t · surrogate_t + β · divergence_t,   Σ_t w_t losses_t = loss

    Averaging these per microbatch gives a mean of means: the weights are what makes microbatches of
    unequal size add up.

    Args:
      log_probs: as for the objective itself.
      rollout: as for the objective itself; its weights are not used.

    Returns:
      Losses, `[..., G, T]`, differentiable; 0 at masked tokens.

    Raises:
      ValueError: as the objective itself.

    Example:
      >>> import gpo_jax as gpo
      >>> objective, mask = gpo.topr(), jnp.array([[[1, 1], [1, 0]]])
      >>> rollout = objective.prepare([[1.0, 0.0]], mask, jnp.full((1, 2, 2), -2.0))
      >>> print(objective.losses(jnp.full((1, 2, 2), -1.0), rollout))
      [[[-0.5 -0.5]
        [ 0.5  0. ]]]
    """
    slots, log_probs, rollout = enter(self, log_probs, rollout)
    terms = run(evaluate_terms, slots, log_probs, rollout)
    return jnp.where(rollout.mask, terms.loss, 0)

  def replace(self, **slots: Any) -> "Objective":
    """Returns a copy with these slots replaced."""
    return dataclasses.replace(self, **slots)

  def __repr__(self) -> str:
    """Shows the expression that makes this objective."""
    fields = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
    slots = [f"{k}={describe(v)}" for k, v in fields if not (v is None or v is False)]
    return f"Objective({', '.join(slots)})".replace(", corrections=()", "")

  def tree_flatten_with_keys(self):
    """Splits the objective into its numbers, named as they are reached, and its structure."""
    numbers, structure = self.tree_flatten()
    counted = jax.tree.unflatten(self._structure, range(len(numbers)))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(counted)]
    names = [f"{_SLOTS[path[0].idx]}{jax.tree_util.keystr(path[1:])}" for path in paths]
    return list(zip(map(GetAttrKey, names), numbers, strict=True)), structure

  def tree_flatten(self):
    """Splits the objective into its numbers and its structure: no empty node, for Orbax."""
    numbers = self._structure.flatten_up_to(self._slots())  # whatever JAX has put in their places
    return numbers, (self._structure, self.allow_token_weighting)

  def _slots(self) -> tuple[Any, ...]:
    return tuple(getattr(self, name) for name in _SLOTS)

  @classmethod
  def tree_unflatten(cls, structure, children) -> "Objective":
    """Puts the slots back unchecked: JAX fills them with more than numbers."""
    slots, allow_token_weighting = structure
    self = object.__new__(cls)
    values = dict(zip(_SLOTS, jax.tree.unflatten(slots, children), strict=True))
    values |= {"allow_token_weighting": allow_token_weighting, "_structure": slots}
    for name, value in values.items():
      object.__setattr__(self, name, value)
    return self


_SLOTS = tuple(field.name for field in dataclasses.fields(Objective))[:-1]


def _check_kinds(advantage, rewards, mask, present, segment_ids, group_ids) -> None:
  """Checks for one reward per response, or several kinds if the advantage takes them."""
  traits, packed = traits_of(advantage), segment_ids is not None
  # Several kinds of reward are for `decoupled`, or for a function from elsewhere that takes them.
  kinds = traits.of_kinds or (group_ids is None and not traits.ours)
  first = max(rewards.ndim - present.ndim, 0) if kinds else 0
  if rewards.shape[first:] != present.shape:
    rows = ", ".join(map(str, mask.shape[:-1]))
    raise ValueError(
      f"rewards must have one value per response, {f'[{rows}, S]' if packed else f'[{rows}]'} "
      f"for mask {list(mask.shape)}; got rewards {list(rewards.shape)}"
      + ("" if packed else ": rows that hold several responses need segment_ids")
    )
  if traits.of_kinds and not first:
    raise ValueError(
      f"rewards must hold several kinds, [K, {', '.join(map(str, present.shape))}], for the "
      f"advantage {describe(advantage)}; got {list(rewards.shape)}: stack them, "
      "jnp.stack([first_kind, second_kind])"
    )


def _check_groups(advantage, rewards, present) -> None:
  """Checks for groups along the last axis, and against groups of one, whose advantages are 0."""
  if present.ndim < 2:
    raise ValueError(
      f"rewards must be [P, G], G samples of each of P prompts; got {list(present.shape)}, which "
      f"would be one group of {present.size}: reshape, rewards.reshape(P, G) and "
      "mask.reshape(P, G, T); for a single group rewards[None], mask[None]; or pass group_ids"
    )
  if present.shape[-1] == 1 and traits_of(advantage).of_group:
    raise ValueError(
      f"rewards must hold groups of at least 2; got {list(rewards.shape)}, groups of one, whose "
      f"advantage {describe(advantage)} is always 0: sample more responses per prompt, use "
      "[P, G] with the samples of one prompt along the last axis, or "
      "advantages.batch_standardize"
    )


def check_objective(objective: Any) -> None:
  """Checks for an objective, rather than a preset that was not called."""
  if not isinstance(objective, Objective):
    raise ValueError(
      f"objective must be an Objective; got {objective!r:.60}: call the preset, such as gpo.grpo()"
    )
