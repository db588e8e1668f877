"""Ground rules: 8 devices, and silent promotion or broadcasting is a failure."""

import functools
import gc
import os

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest
from jax._src.interpreters import mlir

from tests.support.quick import QUICK

# `make test-all` compiles as users do.
_flags = {"xla_force_host_platform_device_count": 8} | ({} if os.environ.get("OPTIMIZE") else QUICK)
_said = [f"--{name}={value}".lower() for name, value in _flags.items()]
os.environ["XLA_FLAGS"] = " ".join([*_said, os.environ.get("XLA_FLAGS", "")])

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
  """Keeps compiled programs beside what pytest keeps: for its other worker and for the next run.

  Programs share one MLIR context, which takes longer to make than a small program to lower; and
  garbage, of which tracing leaves little, is collected rarely.
  """
  mlir.make_ir_context = functools.cache(mlir.make_ir_context)
  gc.set_threshold(200_000, 20, 100)
  if hasattr(config, "cache"):
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_modifyitems(items):
  """Of a test that is `quick` for some of its cases, the others are slow."""
  for item in items:
    quick = item.get_closest_marker("quick")
    if quick and item.callspec.id not in quick.args:
      item.add_marker(pytest.mark.slow)


@pytest.fixture
def x64():
  """Float64 for one test."""
  jax.config.update("jax_enable_x64", True)
  yield
  jax.config.update("jax_enable_x64", False)


@pytest.fixture(autouse=True)
def _three_digits_in_doctests(request):
  """Compares what examples print as text: 1. must not pass for 0.9."""
  shorter = {"precision": 3} if isinstance(request.node, pytest.DoctestItem) else {}
  with np.printoptions(**shorter):
    yield
