"""One pass, if a token's gradient depends only on that token, and the rule that says so.

Then the slope of a chunk is known as soon as its logits are, and one pass over the vocabulary
computes loss and gradients: three matrix products of tokens × V × H, as if the logits were kept.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from gpo_jax.evaluation import evaluate, in_loss
from gpo_jax.linear.backward import Slopes
from gpo_jax.linear.chunks import Tiling
from gpo_jax.linear.derivatives import once
from gpo_jax.linear.forward import TokenLogProbs
from gpo_jax.linear.head import Head
from gpo_jax.linear.mesh import Layout
from gpo_jax.linear.two_passes import in_dtypes, on_devices
from gpo_jax.objective import Objective
from gpo_jax.traits import traits_of
from gpo_jax.types import Rollout, Terms


def is_enough(objective: Objective) -> bool:
  """Applies the rule: every function in the loss is declared tokenwise and binds numbers only."""
  return all(_is_tokenwise(slot) for slot in in_loss(objective))


def is_taken(tiling: Tiling, objective: Objective) -> bool:
  """Tells whether one pass is enough, and two are not asked for."""
  return is_enough(objective) and not tiling.recompute


def _is_tokenwise(slot: Any) -> bool:
  bound = (*slot.args, *slot.keywords.values())
  return traits_of(slot).tokenwise and all(
    _is_tokenwise(value) if callable(value) else value is None or jnp.ndim(value) == 0
    for value in bound
  )


def split(objective: Objective) -> tuple[tuple, tuple]:
  """Splits an objective into a structure and the numbers that are traced.

  Integers and bools, which only functions that are not ours have, stay what they are.
  """
  leaves, tree = jax.tree.flatten(objective)
  fixed = tuple(leaf if isinstance(leaf, bool | int) else None for leaf in leaves)
  return (tree, fixed), tuple(leaf for leaf in leaves if not isinstance(leaf, bool | int))


def join(structure: tuple, numbers: tuple) -> Objective:
  """Puts an objective together again."""
  tree, fixed = structure
  rest = iter(numbers)
  return jax.tree.unflatten(tree, [next(rest) if leaf is None else leaf for leaf in fixed])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def loss(
  tiling: Tiling,
  layout: Layout,
  structure: tuple,
  hidden: jax.Array,
  head: Head,
  tokens: jax.Array,
  numbers: tuple,
  rollout: Rollout,
) -> tuple[jax.Array, Terms]:
  """Computes an objective's loss and terms, from clean inputs."""
  outputs, _, _ = on_devices(tiling, layout, hidden, head, tokens, rollout.mask)
  return _evaluate(join(structure, numbers), outputs, rollout)


def _evaluate(
  objective: Objective, outputs: TokenLogProbs, rollout: Rollout
) -> tuple[jax.Array, Terms]:
  loss, terms = evaluate(objective, outputs.log_probs.astype(rollout.weights.dtype), rollout)
  return loss, dataclasses.replace(terms, entropy=outputs.entropy)


def _forward(tiling, layout, structure, hidden, head, tokens, numbers, rollout):
  advantages = jnp.broadcast_to(rollout.advantages, rollout.mask.shape)
  per_token = rollout.replace(advantages=advantages)

  def slopes(numbers: tuple, log_probs: jax.Array, rollout: Rollout) -> Slopes:
    log_probs = log_probs.astype(rollout.weights.dtype)
    of = lambda x: evaluate(join(structure, numbers), x, rollout)[0]  # noqa: E731
    return Slopes(jax.grad(of)(log_probs), None)

  outputs, _, gradients = on_devices(
    tiling, layout, hidden, head, tokens, rollout.mask, slopes, per_token, numbers
  )
  loss_and_terms, d_numbers = jax.value_and_grad(
    lambda numbers: _evaluate(join(structure, numbers), outputs, rollout),
    has_aux=True,
    allow_int=True,
  )(numbers)
  return once(loss_and_terms), (gradients, d_numbers, hidden, head)


def _backward(tiling, layout, structure, residuals, slopes):
  del tiling, layout, structure
  gradients, d_numbers, hidden, head = residuals

  def scaled(x: jax.Array) -> jax.Array:
    return x if x.dtype == jax.dtypes.float0 else slopes[0].astype(x.dtype) * x

  gradients, d_numbers = jax.tree.map(scaled, (gradients, d_numbers))
  return *in_dtypes(gradients, hidden, head), None, once(d_numbers), None


loss.defvjp(_forward, _backward)
