"""Runs a traced program one primitive at a time: what compiling it would take is most of a test."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core


def interpret(function: Any, *args: Any) -> Any:
  """Traces a function and runs what was traced, without compiling it as a whole."""
  closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
  leaves = _run(closed, jax.tree.leaves(args))
  return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _run(closed: Any, args: Any) -> list:
  jaxpr, consts = (closed.jaxpr, closed.consts) if hasattr(closed, "consts") else (closed, ())
  values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
  read = lambda x: x.val if isinstance(x, core.Literal) else values[x]
  for equation in jaxpr.eqns:
    inputs = list(map(read, equation.invars))
    rule = _RULES.get(equation.primitive.name, _bind)
    values.update(zip(equation.outvars, rule(equation, inputs, **equation.params), strict=True))
  return list(map(read, jaxpr.outvars))


def _bind(equation, inputs, **_):
  bound = equation.primitive.get_bind_params(equation.params)
  functions, params = bound if isinstance(bound, tuple) else ((), bound)  # by version of JAX
  outputs = equation.primitive.bind(*functions, *inputs, **params)
  return outputs if equation.primitive.multiple_results else [outputs]


def _call(equation, inputs, *, jaxpr, **_):
  return _run(jaxpr, inputs)


def _custom_vjp(equation, inputs, *, call_jaxpr, **_):
  return _run(call_jaxpr, inputs)


def _cond(equation, inputs, *, branches, **_):
  return _run(branches[int(inputs[0])], inputs[1:])


def _while(equation, inputs, *, cond_nconsts, cond_jaxpr, body_nconsts, body_jaxpr, **_):
  first, second = cond_nconsts, cond_nconsts + body_nconsts
  carry = inputs[second:]
  while _run(cond_jaxpr, [*inputs[:first], *carry])[0]:
    carry = _run(body_jaxpr, [*inputs[first:second], *carry])
  return carry


def _scan(equation, inputs, *, jaxpr, num_consts, num_carry, length, reverse, **_):
  consts, rest = inputs[:num_consts], inputs[num_consts:]
  carry, xs, ys = rest[:num_carry], rest[num_carry:], []
  for i in reversed(range(length)) if reverse else range(length):
    outputs = _run(jaxpr, [*consts, *carry, *(x[i] for x in xs)])
    carry = outputs[:num_carry]
    ys.append(outputs[num_carry:])
  return [*carry, *map(jnp.stack, zip(*(ys[::-1] if reverse else ys)))]


_RULES = {
  "jit": _call,
  "pjit": _call,
  "remat2": _call,
  "checkpoint": _call,
  "custom_vjp_call": _custom_vjp,
  "cond": _cond,
  "while": _while,
  "scan": _scan,
}
