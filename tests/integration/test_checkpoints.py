"""Checkpoints by Orbax, steps exported to another process, arrays that samplers hold."""

import subprocess
import sys
import textwrap
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gpo_jax as gpo
from tests.support.batches import batch

SCHEDULED = gpo.grpo(beta=0.07).replace(
  corrections=(partial(gpo.corrections.truncate_importance, cap=3.0, level=gpo.levels.sequence),)
)


def saved_and_restored(path, tree, target):
  ocp = pytest.importorskip("orbax.checkpoint")
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path / "step", tree)
    checkpointer.wait_until_finished()
    return checkpointer.restore(path / "step", target)


@pytest.mark.filterwarnings("default")  # of Orbax's own
def test_orbax_restores_an_objective_a_rollout_and_an_optimizer(tmp_path):
  rollout = batch().prepare(SCHEDULED)
  optimizer = optax.adam(1e-3).init(jnp.arange(3.0))
  tree = {"objective": SCHEDULED, "rollout": rollout, "optimizer": optimizer}
  # Another run makes the same structure with numbers of its own, and reads the saved ones.
  corrections = (partial(gpo.corrections.truncate_importance, cap=1.0, level=gpo.levels.sequence),)
  fresh = tree | {"objective": gpo.grpo(beta=0.01).replace(corrections=corrections)}
  restored = saved_and_restored(tmp_path, tree, jax.tree.map(jnp.zeros_like, fresh))
  assert jax.tree.structure(restored) == jax.tree.structure(tree)
  assert repr(restored["objective"]) == repr(SCHEDULED)
  assert repr(fresh["objective"]) != repr(SCHEDULED)
  for found, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(tree)):
    np.testing.assert_array_equal(found, expected)


@pytest.mark.filterwarnings("default")
def test_orbax_does_not_read_one_objective_into_another(tmp_path):
  with pytest.raises(ValueError, match="structures"):
    saved_and_restored(tmp_path, SCHEDULED, gpo.dapo())


def test_an_objective_has_no_empty_node():
  is_empty = lambda x: isinstance(x, (tuple, list, dict)) and not x
  nodes = jax.tree.leaves(SCHEDULED, is_leaf=is_empty)
  assert not any(map(is_empty, nodes))
  assert [float(x) for x in nodes] == pytest.approx([0.2, 0.07, 3.0])
  # A Partial has: () of its arguments, in whose place Orbax would put something else.
  assert any(map(is_empty, jax.tree.leaves(SCHEDULED.surrogate, is_leaf=is_empty)))


# --- export --------------------------------------------------------------------------------------


def test_an_exported_step_runs_in_another_process_without_the_package(tmp_path):
  pytest.importorskip("flatbuffers", reason="pip install flatbuffers, by which JAX saves")
  data = batch()
  objective = gpo.grpo()
  rollout = data.prepare(objective)
  arrays = {name: x for name, x in vars(rollout).items() if x is not None}

  (loss, _), gradient = jax.value_and_grad(objective, has_aux=True)(data.log_probs, rollout)

  @jax.jit
  def step(log_probs, arrays):
    (loss, _), gradient = jax.value_and_grad(objective, has_aux=True)(
      log_probs, gpo.Rollout(**arrays)
    )
    return loss, gradient

  exported = jax.export.export(step)(data.log_probs, arrays)
  (tmp_path / "step.bin").write_bytes(exported.serialize())
  np.savez(tmp_path / "data.npz", log_probs=data.log_probs, **arrays)
  program = """
    import pathlib, sys
    import jax.export, numpy as np
    folder = pathlib.Path(sys.argv[1])
    step = jax.export.deserialize(bytearray((folder / "step.bin").read_bytes()))
    arrays = dict(np.load(folder / "data.npz"))
    loss, gradient = step.call(arrays.pop("log_probs"), arrays)
    np.savez(folder / "out.npz", loss=loss, gradient=gradient)
    assert "gpo_jax" not in sys.modules
  """
  command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
  done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  found = np.load(tmp_path / "out.npz")
  np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)
  np.testing.assert_allclose(found["gradient"], gradient, rtol=1e-5, atol=1e-7)
  assert np.any(found["gradient"])


# --- arrays of samplers --------------------------------------------------------------------------


def aligned(shape):
  """Zeros in memory that JAX on CPU can use as it is: aligned to 64 bytes."""
  raw = np.zeros(4 * np.prod(shape) + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + 4 * np.prod(shape)].view(np.float32).reshape(shape)


def shared(rollout, pointer):
  return rollout.old_log_probs.unsafe_buffer_pointer() == pointer


def test_dlpack_brings_a_samplers_array_without_a_copy():
  mask, old = np.ones((1, 4, 64), bool), aligned((1, 4, 64))
  prepare = partial(gpo.dapo().prepare, np.array([[1.0, 0.0, 0.0, 1.0]]), mask)
  assert shared(prepare(jnp.from_dlpack(old)), old.ctypes.data)
  assert not shared(prepare(jnp.array(old)), old.ctypes.data)  # a copy


def test_dlpack_brings_torchs_arrays():
  torch = pytest.importorskip("torch", reason="pip install torch")
  tensor = torch.arange(-256.0, 0.0).reshape(1, 4, 64) / 100
  mask, rewards = torch.ones(1, 4, 64, dtype=torch.bool), torch.tensor([[1.0, 0.0, 0.0, 1.0]])
  rollout = gpo.dapo().prepare(*map(jnp.from_dlpack, (rewards, mask, tensor)))
  np.testing.assert_array_equal(rollout.old_log_probs, tensor.numpy())
  assert shared(rollout, tensor.data_ptr())
  half = jnp.from_dlpack(tensor.to(torch.bfloat16))  # which NumPy cannot hold
  assert gpo.dapo().prepare(np.asarray(rewards), np.asarray(mask), half).old_log_probs.dtype == (
    jnp.bfloat16
  )
