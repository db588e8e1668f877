"""Objectives in EasyDeL's GRPO trainer, which samples, scores, shards and trains."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp

from gpo_jax._slots import describe
from gpo_jax.metrics import summarize
from gpo_jax.objective import Objective, check_objective
from gpo_jax.types import Rollout


def grpo_trainer(objective: Objective) -> Any:
  """Makes a subclass of EasyDeL's `GRPOTrainer` whose loss and advantages are an objective's.

  Use it as the class itself, with a `GRPOConfig`. Its `loss_type`, `epsilon`, `beta`, `delta`,
  `importance_sampling_level`, `scale_rewards` and `top_entropy_quantile` have no effect. Weights are
  of the whole batch, so gradient accumulation changes nothing but memory. There are no old
  log-probabilities: one update per batch, and a ratio of 1.

  Args:
    objective: the objective. EasyDeL hands on rewards less their group's mean, so its advantage
      must not change with that: `standardize`, `center` and `leave_one_out` do not.

  Returns:
    The class.

  Raises:
    ImportError: where EasyDeL is not installed.
    ValueError: for what is not an objective, and an advantage that changes with a group's mean.

  Reference: https://github.com/erfanzar/EasyDeL, `GRPOTrainer.configure_functions`.
  """
  check_objective(objective)
  rewards = jnp.array([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
  both = [objective.advantage(r, None) for r in (rewards, rewards - rewards.mean(1, keepdims=True))]
  if both[0].shape != rewards.shape or not jnp.allclose(*both, atol=1e-5):
    raise ValueError(
      f"advantage={describe(objective.advantage)} changes when a group's mean is taken off its "
      "rewards, and EasyDeL has done that: use standardize, center or leave_one_out"
    )
  try:
    grpo: Any = importlib.import_module("easydel.trainers.group_relative_policy_optimization")
  except ImportError as error:
    raise ImportError(f"EasyDeL is missing: pip install easydel ({error})") from error

  class ObjectiveTrainer(grpo.GRPOTrainer):
    def configure_functions(self):
      functions = super().configure_functions()
      module: Any = importlib.import_module(grpo.GRPOTrainer.__module__)
      everywhere = jax.NamedSharding(self.model.mesh, jax.P())
      arguments = (self.state_shardings, everywhere)
      for name, returned in {"training": arguments, "evaluation": everywhere}.items():
        step = module.ejit(
          functools.partial(_step, objective, self, name == "training"),
          in_shardings=arguments,
          out_shardings=returned,
          donate_argnums=(0,) if name == "training" else (),
        )
        step.static_argnums_ = ()
        setattr(functions, f"sharded_{name}_step_function", step)
      self._train_shared_fn_static_args = self._eval_shared_fn_static_args = ()
      self.scale_rewards = "none"  # rewards less the group's mean; the rest is the objective's
      return functions

    def _preprocess_batch_input(self, state, batch, is_train):
      batch, metrics = super()._preprocess_batch_input(state, batch, is_train)
      mask, prompts = batch["completion_mask"], batch["prompt_ids"].shape[0]
      groups, present = (x.reshape(prompts, -1) for x in (batch["advantages"], mask.any(1)))
      batch["advantages"] = objective.advantage(groups, present).reshape(-1)
      return batch, metrics

  return ObjectiveTrainer


def _step(objective: Objective, trainer: Any, is_training: bool, state: Any, batch: dict) -> Any:
  functions: Any = importlib.import_module(
    "easydel.trainers.group_relative_policy_optimization._fn"
  )
  settings, mask = trainer.arguments, batch["completion_mask"].astype(bool)
  pieces = settings.gradient_accumulation_steps if is_training else 1
  repeats = mask.shape[0] // batch["prompt_ids"].shape[0]
  prompts = {name: jnp.repeat(batch[name], repeats, 0) for name in ("prompt_ids", "prompt_mask")}
  weights = pieces * objective.weighting(mask, None)  # EasyDeL averages over pieces
  batch = batch | prompts | {"completion_mask": mask, "weights": weights}
  batch.pop("num_items_in_batch", None)

  def loss_fn(tree, piece):
    both = ("prompt_ids", "completion_ids"), ("prompt_mask", "completion_mask")
    ids, attention = (jnp.concatenate([piece[name] for name in names], 1) for names in both)
    log_probs = functions.get_per_token_logps(
      state.merge(tree),
      ids,
      attention,
      piece["prompt_ids"].shape[1],
      logprob_vocab_chunk_size=settings.logprob_vocab_chunk_size,
    )
    rollout = Rollout(
      advantages=piece["advantages"],
      mask=piece["completion_mask"],
      weights=piece["weights"],
      ref_log_probs=None if objective.divergence is None else piece["ref_per_token_logps"],
    )
    loss, terms = objective(log_probs, rollout)
    metrics = summarize(terms, rollout)
    return loss, functions.LossMetrics(loss=loss, accuracy=1, other_metrics=metrics)

  if not is_training:
    return loss_fn(state.graphstate, batch)[1]
  gradients, metrics = functions.minibatch_call(
    state=state,
    batch=batch,
    minibatch_size=mask.shape[0] // pieces,
    grad_fn=jax.value_and_grad(loss_fn, has_aux=True),
  )
  metrics = functions.update_metrics(
    metrics=metrics, learning_rate_fn=trainer.scheduler, step=state.step, gradients=gradients
  )
  state = functions.update_state_respectfully(
    state=state, gradients=gradients, loss_config=settings.loss_config, metrics=metrics
  )
  return state, metrics
