"""Programs that compile in a third of the time: what compilers add is speed, which few measure."""

import functools
from importlib.metadata import version

import jax

# Without LLVM's optimizations, and without the emitters of fusions.
QUICK = _as_users = {"xla_backend_optimization_level": 0}
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # newer XLA has one emitter
  QUICK, _as_users = ({**QUICK, "xla_cpu_use_fusion_emitters": on} for on in (False, True))

jit = functools.partial(jax.jit, compiler_options=QUICK)
# Fused as users' programs are: for what a program is made of, its memory and its work.
fused = functools.partial(jax.jit, compiler_options=_as_users)
