"""An objective as Tunix calls a policy loss: of a model and a train example."""

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gpo_jax import _segments
from gpo_jax._padding import validate
from gpo_jax.integrations._tunix_metrics import tunix_metrics
from gpo_jax.linear import Head, Sharding, Tiling, linear_loss
from gpo_jax.log_probs import token_entropy
from gpo_jax.objective import Objective
from gpo_jax.traits import traits_of
from gpo_jax.types import Rollout

_PACKED = ("segment_ids", "segment_positions")


def tunix(module: str) -> Any:
  """Imports a module of Tunix."""
  try:
    return importlib.import_module(f"tunix.{module}")
  except ImportError as error:
    raise ImportError(f'Tunix is missing: pip install "gpo_jax[tunix]" ({error})') from error


def policy_loss(
  objective: Objective, head: Callable[[Any], Any] | None, sharding: Sharding | None
) -> Callable[..., Any]:
  """Makes the loss of a model; with a head, from hidden states."""
  types = tunix("sft.utils")

  def loss_fn(
    model, train_example, algo_config, pad_id, eos_id, compute_logps_chunk_size=0, **_
  ) -> Any:
    rollout = _rollout(objective, train_example)
    temperature = getattr(algo_config, "temperature", 1.0) or 1.0  # 0 is none to Tunix too
    if head is None:
      log_probs, entropy = _log_probs(
        model, train_example, pad_id, eos_id, temperature, compute_logps_chunk_size
      )
      loss, terms = objective(log_probs, rollout)
      terms = dataclasses.replace(terms, entropy=entropy)
    else:
      hidden = _hidden(model, train_example, pad_id, eos_id)
      given, ids = head(model), train_example.completion_ids
      given = given if isinstance(given, Head) else Head(given)
      # Tunix's chunks are of a row, these of a device.
      tiling = Tiling(chunk_size=ids.shape[0] * compute_logps_chunk_size or None)
      loss, terms = linear_loss(
        objective,
        hidden,
        given._replace(temperature=temperature),
        ids,
        rollout,
        tiling=tiling,
        sharding=sharding,
      )
    metrics = tunix_metrics(terms, rollout)
    if not hasattr(types, "LossOutput"):  # up to 0.1.7
      return loss, metrics
    return _output(types, loss, metrics, _count(objective, rollout), rollout)

  return loss_fn


def _output(types: Any, loss, metrics: dict, count, rollout: Rollout) -> Any:
  """Hands sums and what to divide them by to a Tunix that divides after it has added them up."""
  tokens, policy = jnp.sum(rollout.mask, dtype=jnp.float32), metrics["pg_loss"]
  counts = dict.fromkeys(("kl", "pg_clipfrac", "ppo_kl", "entropy"), tokens) | {"kl_loss": count}
  weighted = {name: types.WeightedMetric(metrics[name] * n, n) for name, n in counts.items()}
  loss, whole = (types.WeightedMetric(x * count, count) for x in (loss, policy))
  metrics = metrics | weighted | {"reduced_pg_loss": policy, "unreduced_pg_loss": whole}
  return types.LossOutput(loss, metrics)


def _rollout(objective: Objective, example: Any) -> Rollout:
  if objective.divergence is not None and example.ref_per_token_logps is None:
    raise ValueError(
      "the divergence needs a reference policy, which Tunix leaves out where its own beta is 0: "
      "give GRPOConfig(beta=...) any other number; the objective's beta is the one that counts"
    )
  mask, segment_ids = example.completion_mask.astype(bool), example.segment_ids
  rollout = Rollout(
    advantages=example.advantages,
    mask=mask,
    weights=objective.weighting(mask, segment_ids),
    old_log_probs=example.old_per_token_logps,
    ref_log_probs=example.ref_per_token_logps,
    segment_ids=segment_ids,
    factor=getattr(example, "sampler_is_weights", None),
  )
  return validate(rollout)


def _log_probs(model, example, pad_id, eos_id, temperature, chunk_size) -> tuple:
  """Runs the policy as Tunix's own losses do: log-probabilities, and entropies for its logs."""
  nnx: Any = importlib.import_module("flax.nnx")
  compute = tunix("rl.common").compute_per_token_logps
  parameters = inspect.signature(compute).parameters
  has_entropy = "return_entropy" in parameters  # after 0.1.7
  given = {name: getattr(example, name, None) for name in _PACKED}
  given |= {"chunk_size": chunk_size} if "chunk_size" in parameters else {}
  given["return_entropy" if has_entropy else "return_logits"] = True
  log_probs, second = compute(
    *nnx.split(model),
    prompt_tokens=example.prompt_ids,
    completion_tokens=example.completion_ids,
    pad_id=pad_id,
    eos_id=eos_id,
    stop_gradient=False,
    temperature=temperature,
    **given,
  )
  second = jax.lax.stop_gradient(second)
  return log_probs, second if has_entropy else token_entropy(second)


def _hidden(model, example, pad_id, eos_id) -> jax.Array:
  """Runs the policy up to its last hidden states, each that of the token before."""
  packed = {name: getattr(example, name, None) for name in _PACKED}
  ids, positions, attention_mask, alone = tunix("rl.common").process_ids(
    example.prompt_ids, example.completion_ids, pad_id, eos_id, **packed
  )
  kwargs = {"positions": positions, "cache": None, "attention_mask": attention_mask}
  parameters = inspect.signature(model.__call__).parameters
  if "skip_lm_head" not in parameters:
    raise ValueError(
      f"head= needs a model that returns hidden states for skip_lm_head=True; "
      f"{type(model).__name__} does not take it: register without head"
    )
  if "segment_ids" in parameters:
    kwargs["segment_ids"] = alone if packed["segment_ids"] is None else packed["segment_ids"]
  hidden, _ = model(ids, **kwargs, skip_lm_head=True)
  hidden = jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))
  return hidden[:, -example.completion_ids.shape[1] :]


def _count(objective: Objective, rollout: Rollout) -> jax.Array:
  """Counts what the weighting divides by: tokens or responses; 1 if that is not known."""
  denominator = traits_of(objective.weighting).denominator
  active = rollout.mask.astype(jnp.float32)
  if denominator == "responses":
    return _segments.count(active, rollout.segment_ids)
  return jnp.sum(active) if denominator == "tokens" else jnp.ones(())
