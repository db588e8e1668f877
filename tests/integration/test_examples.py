"""Every example runs as a user would run it, and what it claims is so."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

import gpo_jax as gpo

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
FRAMEWORKS = {
  "with_pytrees": "optax",
  "with_flax_nnx": "flax",
  "with_flax_linen": "flax",
  "with_equinox": "equinox",
  "with_haiku": "haiku",
}


def launch(script, *arguments, devices=1):
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
  environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  return subprocess.Popen(
    [sys.executable, EXAMPLES / f"{script}.py", *map(str, arguments)],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
  )  # fmt: skip


def finish(process, timeout=300):
  output, errors = process.communicate(timeout=timeout)
  assert process.returncode == 0, errors
  return output


@pytest.mark.quick("with_flax_nnx")
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_policy_of_every_framework_learns(name):
  pytest.importorskip(FRAMEWORKS[name])
  before, after = (float(x) for x in finish(launch(name)).split()[1::2])
  assert before < 0.3
  assert after > 0.9


def test_every_framework_has_its_example():
  assert {path.stem for path in EXAMPLES.glob("with_*.py")} == {
    *FRAMEWORKS,
    "with_hydra",
    "with_easydel",
  }


@pytest.mark.slow
def test_hydra_makes_the_objective_from_files_and_the_command_line():
  pytest.importorskip("hydra", reason="pip install hydra-core")
  printed = finish(launch("with_hydra", "objective=gspo", "objective.epsilon_high=5e-4"))
  assert printed.strip() == repr(gpo.gspo(epsilon_low=3e-4, epsilon_high=5e-4))
  assert finish(launch("with_hydra")).strip() == repr(gpo.dapo())


@pytest.mark.slow
def test_easydels_trainer_learns():
  pytest.importorskip("easydel", reason="make test-easydel: an environment of its own")
  *_, line = finish(launch("with_easydel"), timeout=1800).splitlines()
  before, after = (float(x) for x in line.split()[1::2])
  assert after > before + 0.3


@pytest.mark.slow
def test_packed_rows_train_the_demo_s_policy_as_plain_ones_do():
  plain, packed = finish(launch("packing")).splitlines()
  assert plain.split("loss ")[1] == packed.split("loss ")[1].split(",")[0]
  assert float(packed.split()[-1]) < 1e-5
  assert int(packed.split()[0]) < int(plain.split()[0]) / 2


def free_port():
  with socket.socket() as server:
    server.bind(("localhost", 0))
    return server.getsockname()[1]


def assert_same_history(file, expected):
  found = dict(np.load(file))
  assert found.keys() == expected.keys()
  for key, x in expected.items():
    np.testing.assert_allclose(found[key], x, rtol=1e-5, atol=1e-6, err_msg=key)


def test_eight_devices_are_one_device(tmp_path):
  one, eight = tmp_path / "one.npz", tmp_path / "eight.npz"
  processes = launch("devices", "--out", one), launch("devices", "--out", eight, devices=8)
  outputs = [finish(process) for process in processes]
  assert "8 devices" in outputs[1]
  expected = dict(np.load(one))
  assert len(expected) == 3 * 3 + 2
  assert_same_history(eight, expected)


@pytest.mark.slow
def test_two_processes_of_two_devices_are_one_device(tmp_path):
  finish(launch("devices", "--out", tmp_path / "one.npz"))
  address = f"localhost:{free_port()}"
  joined = ["--coordinator", address, "--processes", 2, "--out", tmp_path / "two.npz"]
  pair = [launch("devices", *joined, "--process", i, devices=2) for i in range(2)]
  try:
    outputs = [finish(process) for process in pair]
  finally:
    for process in pair:
      process.kill()
  assert "4 devices" in outputs[0]
  assert_same_history(tmp_path / "two.npz", dict(np.load(tmp_path / "one.npz")))
