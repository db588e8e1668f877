"""Objectives as policy losses of Tunix, whose learners then sample, shard and train."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpo_jax._inputs import check_returned
from gpo_jax._slots import describe
from gpo_jax.integrations._tunix_loss import policy_loss, tunix
from gpo_jax.linear import Sharding
from gpo_jax.objective import Objective, check_objective
from gpo_jax.traits import traits_of
from gpo_jax.types import Advantage


def register(
  name: str,
  objective: Objective,
  *,
  head: Callable[[Any], Any] | None = None,
  sharding: Sharding | None = None,
  overwrite: bool = False,
) -> None:
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

  Tunix adds up the rewards of several reward functions before an advantage sees them. For an
  advantage of several kinds of reward, `decoupled`, set `GRPOConfig(reward_manager=name)` too,
  which hands them over separately, in the order of `reward_fns`.

  With `num_iterations` above 1, sample at `temperature=1.0`: Tunix 0.1.7 computes old
  log-probabilities at 1 in its vanilla engine, whatever the temperature of the current ones.

  Args:
    name: a name that Tunix does not know yet.
    objective: the objective. Without an advantage function it registers no estimator. Corrections
      that need `sampler_log_probs` do not work, Tunix passes none on; its own sampler weights
      multiply the surrogate.
    head: `head(model)` → the model's unembedding `[V, H]`, or a `gpo.Head` with a bias or a
      softcap; the temperature is Tunix's. The loss is then `linear_loss` of the hidden states that
      the model returns for `skip_lm_head=True`, and logits of all tokens never form. Without it
      they do, unless `compute_logps_chunk_size` is set, as in Tunix's own losses.
    sharding: with `head`, how tokens `[B, T]` and the unembedding lie on the actor's mesh.
    overwrite: whether a name that Tunix knows is replaced, for trainers that fix it: "grpo".

  Raises:
    ImportError: where Tunix is not installed.
    ValueError: for a name that is taken, and what is not an objective; later, in training, for a
      divergence without a reference policy, and rewards of another number of kinds.

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
  tunix("rl.algo_core")  # registers Tunix's own functions
  functions = {"policy_loss_fn": policy_loss(objective, head, sharding)}
  if objective.advantage is not None:
    functions["advantage_estimator"] = _advantage_estimator(objective.advantage)
    functions["reward_manager"] = _separate_rewards()
  registry = tunix("rl.function_registry").default_registry
  for kind in functions:
    if name in registry.list_functions(kind) and not overwrite:
      raise ValueError(
        f"Tunix has a {kind} named {name!r} already: choose another name, or overwrite=True"
      )
  for kind, function in functions.items():
    registry.register(kind, name)(function)


def adapter(
  objective: Objective,
  *,
  head: Callable[[Any], Any] | None = None,
  sharding: Sharding | None = None,
  **settings: Any,
) -> Any:
  """Makes the algorithm adapter of an objective for Tunix's experimental orchestrator.

  The orchestrator asks an `AlgorithmAdapter` for advantages and for the loss, not the registry.
  Needs a Tunix after 0.1.7.

  Args:
    objective: the objective.
    head: as in `register`.
    sharding: as in `register`.
    **settings: of Tunix's `GRPOAdapter`: `group_size`, `mini_batch_size` and others.

  Returns:
    A `GRPOAdapter` whose advantages and loss are the objective's; it asks for the reference
    policy's log-probabilities iff the objective has a divergence.

  Raises:
    ImportError: where Tunix is not installed, or has no orchestrator.
    ValueError: for what is not an objective, and one without an advantage function.
  """
  check_objective(objective)
  module = tunix("experimental.orchestrator.algorithm_adapter")
  if objective.advantage is None:
    raise ValueError("the orchestrator needs an objective with an advantage; got advantage=None")
  estimate = _advantage_estimator(objective.advantage)

  class ObjectiveAdapter(module.GRPOAdapter):
    def compute_advantages(self, rewards, num_generations=None, **_):
      return estimate(np.asarray(rewards), num_generations or self.group_size)

    def loss_fn(self):
      return policy_loss(objective, head, sharding)

  made = ObjectiveAdapter(**settings)
  made.requires_reference_kl = objective.divergence is not None
  return made


def _advantage_estimator(advantage: Advantage) -> Callable[..., jax.Array]:
  traits, name = traits_of(advantage), describe(advantage)

  def estimate(rewards: Any, num_generations: int, valid_mask: Any = None) -> jax.Array:
    rewards = jnp.asarray(rewards, jnp.float32)
    if traits.of_kinds and rewards.ndim == 1:
      raise ValueError(
        f"advantage={name} needs separate rewards, and Tunix has added them up: set "
        "GRPOConfig(reward_manager=...) to the name of the objective, too"
      )
    if traits.ours and not traits.of_kinds and rewards.ndim > 1:
      raise ValueError(
        f"advantage={name} takes one reward per response; got {list(rewards.shape)}: leave "
        "GRPOConfig(reward_manager=...) at its default, which adds rewards up"
      )
    groups = rewards.T.reshape(*rewards.shape[1:], -1, num_generations)
    where = None if valid_mask is None else jnp.asarray(valid_mask, bool).reshape(groups.shape[-2:])
    advantages = advantage(groups, where)
    return check_returned("advantage", advantages, groups.shape[-2:], "response").reshape(-1)

  return estimate


def _separate_rewards() -> type:
  """Makes the reward manager that does not add up what its functions return."""
  manager = tunix("rl.reward_manager").SequenceRewardManager

  class SeparateRewards(manager):
    def __call__(self, prompts, completions, **kwargs):
      each = [manager(function, self.algo_config) for function in self.reward_fns]
      rewards = [one(prompts, completions, **kwargs)["rewards"] for one in each]
      rewards = np.stack(rewards, axis=1)
      metrics = self._prepare_log_metrics(prompts, completions, rewards)
      return {"rewards": rewards, "log_metrics": metrics}

  return SeparateRewards
