"""From an objective and a policy to the loss function that training code differentiates."""

from collections.abc import Callable
from typing import Any

import jax

from gpo_jax.objective import Objective, check_objective
from gpo_jax.types import Rollout


def as_loss(
  objective: Objective, policy: Callable[..., jax.Array], *, has_aux: bool = True
) -> Callable[..., Any]:
  """Makes a loss function of parameters: the objective at the policy's log-probabilities.

      loss_fn(params, rollout, *inputs) = objective(policy(params, *inputs), rollout)

  For `jax.value_and_grad(loss_fn, has_aux=True)`. Slice `rollout` and `inputs` along their rows for
  microbatches: losses and gradients add up, so accumulate sums, never means. Terms concatenate:

      kinds = optax.microbatching.AccumulationType
      step = optax.microbatching.microbatch(
        jax.value_and_grad(loss_fn, has_aux=True), argnums=(1, 2), microbatch_size=2,
        accumulator=((kinds.SUM, kinds.CONCAT), kinds.SUM))

  In `jax.lax.scan` sum losses and gradients in the carry and stack the terms. `params` is any
  pytree, an NNX module too: differentiate it with `jax.grad`, which works inside of both loops
  (`nnx.grad` does not). An optax line search wants `has_aux=False` for its `value_fn`.

  Args:
    objective: the objective; made inside a jitted step, it may have scheduled numbers.
    policy: `policy(params, *inputs) -> log_probs`, `[..., G, T]`, of the rollout's tokens.
    has_aux: whether to return `(loss, terms)`, or the loss alone.

  Returns:
    The function, which raises on a shape mismatch as the objective does.

  Raises:
    ValueError: if it is not given an objective (a preset must be called) and a function.

  Example:
    >>> import gpo_jax as gpo
    >>> import jax.numpy as jnp
    >>> loss_fn = as_loss(gpo.dapo(), lambda params, tokens: jax.nn.log_softmax(params)[tokens])
    >>> tokens = jnp.array([[[0], [1]]])
    >>> rollout = gpo.dapo().prepare(jnp.array([[1.0, 0.0]]), jnp.ones((1, 2, 1)))
    >>> (loss, terms), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
    ...   jnp.zeros(2), rollout, tokens
    ... )
    >>> print(gradient)
    [-0.354  0.354]
  """
  check_objective(objective)
  if not callable(policy):
    raise ValueError(f"policy must be a function of (params, *inputs); got {policy!r:.60}")

  def loss_fn(params: Any, rollout: Rollout, *inputs: Any) -> Any:
    loss, terms = objective(policy(params, *inputs), rollout)
    return (loss, terms) if has_aux else loss

  return loss_fn
