"""Programs that compile in a third of the time: what compilers add is speed, which few measure."""

import functools
from importlib.metadata import version

import jax

QUICK, OPTIMIZED = {"xla_backend_optimization_level": 0}, {"xla_backend_optimization_level": 3}
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # newer XLA does not know it
  QUICK["xla_cpu_use_fusion_emitters"], OPTIMIZED["xla_cpu_use_fusion_emitters"] = False, True

jit = functools.partial(jax.jit, compiler_options=QUICK)
optimized = functools.partial(jax.jit, compiler_options=OPTIMIZED)
