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

  For `jax.value_and_grad(loss_fn, has_aux=True)`. Cut `rollout` and `inputs` along their rows for
  microbatches, or have `optax.microbatching.microbatch` cut them; losses and gradients add up:
  accumulate sums, never means. An optax line search wants `has_aux=False` for its `value_fn`.

  Args:
    objective: the objective; made inside a jitted step, it may have scheduled numbers.
    policy: `policy(params, *inputs) -> log_probs`, `[..., G, T]`, of the rollout's tokens.
    has_aux: whether to return `(loss, terms)`, or the loss alone.

  Returns:
    The function; whatever shapes do not fit it refuses as the objective does.

  Raises:
    ValueError: for what is no objective, such as a preset not called, or no function.

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
