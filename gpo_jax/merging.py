"""Metrics of microbatches become those of the whole batch."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

_TOTALS = ("loss", "surrogate", "divergence", "tokens", "responses", "groups")
_SAMPLER = ("old_log_prob", "sampler_log_prob")


def merge_metrics(
  metrics: Mapping[str, jax.Array] | Sequence[Mapping[str, jax.Array]],
) -> dict[str, jax.Array]:
  """Merges metrics of microbatches into those of the whole batch.

      merge_metrics([summarize(terms, part) of each slice]) = summarize(all terms, rollout)

  Equal to rounding, whatever the slices' sizes; `dead_groups` if slices hold whole groups. A mean
  of metrics is not: slices differ in tokens, and the largest of all is not a mean.

  Args:
    metrics: a sequence of what `summarize` returned; or one dict of arrays with the microbatches
      along the first axis, as `jax.lax.scan` and `jax.vmap` stack them.

  Returns:
    Scalars by name, as `summarize` returns them.

  Raises:
    ValueError: for an empty sequence, names that differ, and what `summarize` did not return.

  Example:
    >>> import gpo_jax as gpo
    >>> objective = gpo.dapo()
    >>> rollout = objective.prepare([[1.0, 0.0]] * 3, jnp.ones((3, 2, 1)), jnp.zeros((3, 2, 1)))
    >>> log_probs, parts = jnp.zeros((3, 2, 1)).at[0, 0].set(0.5), []
    >>> for cut in (slice(0, 1), slice(1, 3)):
    ...   part = jax.tree.map(lambda x: x[cut], rollout)
    ...   parts.append(gpo.summarize(objective(log_probs[cut], part)[1], part))
    >>> print(parts[0]["clip_fraction"], f"{gpo.merge_metrics(parts)['clip_fraction']:.3f}")
    0.5 0.167
  """
  return _merge(_stack(metrics))


@jax.jit
def _merge(parts: dict[str, jax.Array]) -> dict[str, jax.Array]:
  def mean(name: str, values: jax.Array) -> jax.Array:
    count = parts[_counted(name)]
    return jnp.sum(count * values) / jnp.maximum(jnp.sum(count), 1)

  def std(name: str) -> jax.Array:
    center = f"{name}_mean"
    between = parts[center] - mean(center, parts[center])
    return jnp.sqrt(mean(center, parts[f"{name}_std"] ** 2 + between**2))

  def correlation() -> jax.Array:
    between, within, scale = 1.0, parts["sampler_correlation"], 1.0
    for name in _SAMPLER:
      center = parts[f"{name}_mean"]
      between, within = between * (center - mean(name, center)), within * parts[f"{name}_std"]
      scale = scale * std(name)
    return mean("sampler_correlation", within + between) / jnp.where(scale == 0, 1, scale)

  def effective_sample_size(name: str) -> jax.Array:
    kind = name.removesuffix("effective_sample_size")
    center = {
      "": "ratio_mean",
      "factor_": "factor_mean",
      "response_factor_": "response_factor_mean",
    }
    center = center.get(kind, f"{kind}weight_mean")
    size = parts[name]
    square = mean(center, parts[center] ** 2 / jnp.where(size == 0, 1, size))
    return mean(center, parts[center]) ** 2 / jnp.where(square == 0, 1, square)

  def extreme(name: str) -> jax.Array:
    sign = -1 if name.endswith("_min") else 1
    # Slices without a token do not count, unless there are no others.
    some = (parts["tokens"] > 0) | (jnp.sum(parts["tokens"]) == 0)
    return sign * jnp.max(jnp.where(some, sign * parts[name], -jnp.inf))

  def merged(name: str, values: jax.Array) -> jax.Array:
    if name in _TOTALS:
      return jnp.sum(values)
    if name.endswith("effective_sample_size"):
      return effective_sample_size(name)
    if name.endswith("_std"):
      return std(name.removesuffix("_std"))
    if name.endswith(("_max", "_min")):
      return extreme(name)
    if name == "sampler_correlation":
      return correlation()
    if name.endswith("truncated_fraction"):  # by the largest factor of all
      values = jnp.where(parts["factor_max"] == jnp.max(parts["factor_max"]), values, 0)
    return mean(name, values)

  return {name: merged(name, values) for name, values in parts.items()}


def _counted(name: str) -> str:
  """Names what a mean is over."""
  if name == "dead_groups":
    return "groups"
  return "responses" if name.startswith(("response_", "reward_")) else "tokens"


def _stack(metrics: Mapping | Sequence[Mapping]) -> dict[str, jax.Array]:
  expected = "metrics must be what summarize returned for each microbatch"
  if isinstance(metrics, Mapping):
    parts = {name: jnp.asarray(value) for name, value in metrics.items()}
    if shapes := {x.shape for x in parts.values() if x.ndim != 1}:
      raise ValueError(f"{expected}, stacked along one axis; got shapes {sorted(shapes)}")
  else:
    if not isinstance(metrics, Sequence) or not all(isinstance(x, Mapping) for x in metrics):
      raise ValueError(f"{expected}: a sequence of dicts, or one of arrays; got {metrics!r:.60}")
    names = [set(part) for part in metrics]
    if not names or any(other != names[0] for other in names):
      got = sorted(set.union(*names) - set.intersection(*names)) if names else "an empty sequence"
      raise ValueError(f"{expected}, all of the same names; got {got}")
    parts = {name: jnp.stack([part[name] for part in metrics]) for name in metrics[0]}
  if missing := {"loss", "tokens", "responses", "groups"} - parts.keys():
    raise ValueError(f"{expected}; got no {', '.join(sorted(missing))}")
  return parts
