"""Objectives as per-token losses of SkyRL's JAX backend, which samples and trains LoRA adapters."""

import importlib
from collections.abc import Callable
from typing import Any

import jax

from gpo_jax.objective import Objective, check_objective
from gpo_jax.types import Rollout


def register(name: str, objective: Objective) -> None:
  """Puts an objective in the place of a loss that SkyRL's JAX backend has.

  The backend's table of losses is fixed, and its clients choose from it: `loss_fn="ppo"`. Register
  under such a name in the server's process before the backend starts: it compiles the table in.

  The backend divides each sequence's losses by the sequence's tokens and sums over sequences, so
  an objective's weighting does not reach it: it is `sequence_mean`, times the number of sequences.
  Advantages come from the client, per token; the denominator of the ratio are the sampler's
  log-probabilities. There is no reference policy, and the client's clip thresholds have no effect.

  Args:
    name: of a loss in `skyrl.tinker.loss_fns.LOSS_FUNCTION_MAP`, such as "ppo".
    objective: the objective, without a divergence that needs a reference.

  Raises:
    ImportError: where SkyRL is not installed (it needs Python 3.12).
    ValueError: for a name that the table does not have, and what is not an objective.

  Reference: https://github.com/NovaSky-AI/SkyRL, `skyrl.tinker.loss_fns`.
  """
  loss_fn = per_token_loss(objective)
  try:
    table: Any = importlib.import_module("skyrl.tinker.loss_fns")
  except ImportError as error:
    raise ImportError(f'SkyRL is missing: pip install "skyrl[jax]" ({error})') from error
  if name not in table.LOSS_FUNCTION_MAP:
    raise ValueError(f"name must be one of {', '.join(table.LOSS_FUNCTION_MAP)}; got {name!r:.60}")
  # Changed in place: the backend has imported the list.
  table.LOSS_FUNCTIONS[table.LOSS_TYPES[name]] = loss_fn
  table.LOSS_FUNCTION_MAP[name] = loss_fn


def per_token_loss(objective: Objective) -> Callable[..., jax.Array]:
  """Makes a loss of the signature that SkyRL's table has: of one sequence, `[T]` each.

  Args:
    objective: the objective.

  Returns:
    `loss_fn(target_logprobs, loss_mask, sampling_logprobs, advantages, config)`, losses `[T]`,
    times the mask, and 0 where it is 0 whatever the arrays hold there.

  Raises:
    ValueError: for what is not an objective.

  Example:
    >>> import jax.numpy as jnp
    >>> import gpo_jax as gpo
    >>> loss_fn = per_token_loss(gpo.gspo(epsilon_low=0.2))
    >>> now, then, mask = jnp.array([-1.0, -2.0, 9.0]), jnp.full(3, -1.0), jnp.array([1, 1, 0])
    >>> print(loss_fn(now, mask, then, jnp.ones(3)))  # both: −exp(−1/2)
    [-0.607 -0.607  0.   ]
  """
  check_objective(objective)

  def loss_fn(
    target_logprobs: jax.Array,
    loss_mask: jax.Array,
    sampling_logprobs: jax.Array,
    advantages: jax.Array,
    _loss_fn_config: Any = None,
  ) -> jax.Array:
    rollout = Rollout(
      advantages=advantages,
      mask=loss_mask != 0,
      weights=loss_mask,
      old_log_probs=sampling_logprobs,
      sampler_log_probs=sampling_logprobs,
    )
    losses = objective.losses(target_logprobs, rollout)
    return losses * loss_mask.astype(losses.dtype)

  return loss_fn
