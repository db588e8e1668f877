"""Objectives as policy losses of Tunix, whose learners then sample, shard and train."""

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gpo_jax import _segments
from gpo_jax.integrations._tunix_metrics import tunix_metrics
from gpo_jax.log_probs import token_entropy
from gpo_jax.objective import Objective, check_objective
from gpo_jax.traits import traits_of
from gpo_jax.types import Advantage, Rollout


def register(name: str, objective: Objective) -> None:
  """Registers an objective with Tunix: as a policy loss, and its advantage as an estimator.

      GRPOConfig(policy_loss_fn=name, advantage_estimator=name, …)

  The objective alone defines the loss; the config's `epsilon`, `beta`, `kl_loss_mode`, `loss_algo`
  and `loss_agg_mode` do not reach it. But Tunix runs the reference policy only where the config's
  `beta` is not 0: keep its default for an objective with a divergence, set 0.0 for one without.

  Advantages see all that one rollout call returns, weights what Tunix shows the loss: one
  microbatch, or one packed row. Tunix 0.1.7 averages their gradients: `token_mean` is then a mean
  of means, and weightings by response are exact only while all hold equally many responses; with
  neither `train_micro_batch_size` nor `max_seq_token_per_tpu` they are exact. A Tunix that has
  `LossOutput` divides sums by sums: all `gpo_jax.weightings` are exact but `token_sum`, averaged.

  With `num_iterations` above 1, sample at `temperature=1.0`: Tunix 0.1.7 computes old
  log-probabilities at 1 in its vanilla engine, whatever the temperature of the current ones.

  Args:
    name: a name that Tunix does not know yet.
    objective: the objective. Without an advantage function it registers no estimator. Corrections
      that need `sampler_log_probs` do not work, Tunix passes none on; its own sampler weights
      multiply the surrogate.

  Raises:
    ImportError: where Tunix is not installed.
    ValueError: for a name that is taken and what is not an objective; later, in training, for a
      divergence without a reference policy.

  Example:
    >>> import gpo_jax as gpo
    >>> from gpo_jax.integrations.tunix import register
    >>> def dapo_config():  # needs google-tunix
    ...   from tunix.rl.grpo.grpo_learner import GRPOConfig
    ...   register("my_dapo", gpo.dapo())
    ...   return GRPOConfig(policy_loss_fn="my_dapo", advantage_estimator="my_dapo", beta=0.0)

  Reference: https://github.com/google/tunix, `tunix.rl.function_registry`.
  """
  check_objective(objective)
  _tunix("rl.algo_core")  # registers Tunix's own functions
  registry = _tunix("rl.function_registry")
  for kind in ("policy_loss_fn", "advantage_estimator"):
    if name in registry.default_registry.list_functions(kind):
      raise ValueError(f"Tunix has a {kind} named {name!r} already: choose another name")
  registry.register_policy_loss_fn(name)(_policy_loss(objective))
  if objective.advantage is not None:
    estimator = _advantage_estimator(objective.advantage)
    registry.register_advantage_estimator(name)(estimator)


def _tunix(module: str) -> Any:
  try:
    return importlib.import_module(f"tunix.{module}")
  except ImportError as error:
    raise ImportError(f'Tunix is missing: pip install "gpo_jax[tunix]" ({error})') from error


def _advantage_estimator(advantage: Advantage) -> Callable[..., jax.Array]:
  def estimate(rewards: Any, num_generations: int, valid_mask: Any = None) -> jax.Array:
    groups = jnp.asarray(rewards, jnp.float32).reshape(-1, num_generations)
    where = None if valid_mask is None else jnp.asarray(valid_mask, bool).reshape(groups.shape)
    return advantage(groups, where).reshape(-1)

  return estimate


def _policy_loss(objective: Objective) -> Callable[..., Any]:
  types = _tunix("sft.utils")

  def policy_loss(model, train_example, algo_config, pad_id, eos_id, **_) -> Any:
    rollout = _rollout(objective, train_example)
    log_probs, entropy = _forward(model, train_example, algo_config, pad_id, eos_id)
    loss, terms = objective(log_probs, rollout)
    metrics = tunix_metrics(dataclasses.replace(terms, entropy=entropy), rollout)
    if not hasattr(types, "LossOutput"):  # up to 0.1.7
      return loss, metrics
    count, policy = _count(objective, rollout), metrics["pg_loss"]
    loss, whole = (types.WeightedMetric(x * count, count) for x in (loss, policy))
    return types.LossOutput(loss, metrics | {"reduced_pg_loss": policy, "unreduced_pg_loss": whole})

  return policy_loss


def _rollout(objective: Objective, example: Any) -> Rollout:
  if objective.divergence is not None and example.ref_per_token_logps is None:
    raise ValueError(
      "the divergence needs a reference policy, which Tunix leaves out where its own beta is 0: "
      "give GRPOConfig(beta=...) any other number; the objective's beta is the one that counts"
    )
  mask, segment_ids = example.completion_mask.astype(bool), example.segment_ids
  return Rollout(
    advantages=example.advantages,
    mask=mask,
    weights=objective.weighting(mask, segment_ids),
    old_log_probs=example.old_per_token_logps,
    ref_log_probs=example.ref_per_token_logps,
    segment_ids=segment_ids,
    factor=getattr(example, "sampler_is_weights", None),
  )


def _forward(model, example, config, pad_id, eos_id) -> tuple[jax.Array, jax.Array]:
  """Runs the policy as Tunix's own losses do: log-probabilities, and entropies for its logs."""
  nnx: Any = importlib.import_module("flax.nnx")
  compute = _tunix("rl.common").compute_per_token_logps
  parameters = inspect.signature(compute).parameters
  has_entropy = "return_entropy" in parameters  # after 0.1.7
  given = {name: getattr(example, name, None) for name in parameters}  # segment ids and the like
  given = {name: value for name, value in given.items() if value is not None}
  given["return_entropy" if has_entropy else "return_logits"] = True
  log_probs, second = compute(
    *nnx.split(model),
    prompt_tokens=example.prompt_ids,
    completion_tokens=example.completion_ids,
    pad_id=pad_id,
    eos_id=eos_id,
    stop_gradient=False,
    temperature=getattr(config, "temperature", 1.0),
    **given,
  )
  second = jax.lax.stop_gradient(second)
  return log_probs, second if has_entropy else token_entropy(second)


def _count(objective: Objective, rollout: Rollout) -> jax.Array:
  """Counts what the weighting divides by: tokens or responses; 1 if that is not known."""
  denominator = traits_of(objective.weighting).denominator
  active = rollout.mask.astype(jnp.float32)
  if denominator == "responses":
    return _segments.count(active, rollout.segment_ids)
  return jnp.sum(active) if denominator == "tokens" else jnp.ones(())
