"""Integrations cost nothing until they are used, and say what they miss."""

import subprocess
import sys

import pytest

from gpo_jax import dapo
from gpo_jax.integrations.tunix import register


def test_importing_an_integration_does_not_import_its_library():
  code = (
    "import sys, gpo_jax, gpo_jax.integrations.tunix; "
    "print(*sorted({'tunix', 'flax', 'transformers'} & set(sys.modules)))"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  assert not done.stdout.strip()


def test_a_missing_library_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "tunix.rl.algo_core", None)
  monkeypatch.setitem(sys.modules, "tunix", None)
  with pytest.raises(ImportError, match=r'pip install "gpo_jax\[tunix\]"'):
    register("objective", dapo())
