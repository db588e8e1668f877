"""A `jax.jit` that compiles in half the time: what LLVM adds is speed, which nobody measures."""

import functools

import jax

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
