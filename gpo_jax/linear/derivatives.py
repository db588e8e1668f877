"""Derivatives by hand are first ones, in reverse mode: others raise, and name what has them."""

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def _refuse(*_: Any, **__: Any) -> NoReturn:
  raise NotImplementedError(
    "linear_loss and linear_token_log_probs have first reverse-mode derivatives only; for others "
    "use token_log_probs(hidden @ unembedding.T, tokens)"
  )


@jax.custom_jvp
def once(tree: Any) -> Any:
  """Returns its argument, and raises if it is differentiated: for what derivatives return."""
  return tree


once.defjvp(_refuse)

# The identity of a tangent: reverse mode transposes it, forward mode runs it.
_tangent = Primitive("reverse_mode_only")
_tangent.def_abstract_eval(lambda x: x)
_tangent.def_impl(_refuse)
mlir.register_lowering(_tangent, _refuse)
ad.deflinear2(_tangent, lambda cotangent, _: [cotangent])
batching.defvectorized(_tangent)


def reverse_only(tree: Any) -> Any:
  """Returns its argument, and raises in forward mode: for what is differentiated by hand."""
  return jax.tree.map(lambda x: _identity(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x, tree)


@jax.custom_jvp
def _identity(x: jax.Array) -> jax.Array:
  return x


@_identity.defjvp
def _identity_jvp(primals: tuple, tangents: tuple):
  return _identity(*primals), _tangent.bind(*tangents)
