"""The package as a stranger meets it: the wheel installed elsewhere, the import, the README."""

import ast
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

import gpo_jax
from tests.support.blocks import blocks_of, printed_and_written

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def run(*command, **kwargs):
  done = subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout.strip()


def test_the_wheel_installed_elsewhere(tmp_path):
  pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
  run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ROOT)
  (wheel,) = tmp_path.glob("*.whl")
  run(*pip, "install", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel)
  names = zipfile.ZipFile(wheel).namelist()
  assert "gpo_jax/py.typed" in names
  assert not [name for name in names if not name.startswith("gpo_jax")]
  code = (
    "import sys; sys.path.insert(0, 'site'); import gpo_jax; "
    "print(gpo_jax.__version__, gpo_jax.__file__, gpo_jax.gpo_objective([1.], [2.], [1.], [1.]))"
  )
  version, file, value = run(sys.executable, "-I", "-W", "error", "-c", code, cwd=tmp_path).split()
  assert version == gpo_jax.__version__
  assert pathlib.Path(file).resolve() == tmp_path.resolve() / "site/gpo_jax/__init__.py"
  assert float(value) == 2.0
  metadata = next(name for name in names if name.endswith("METADATA"))
  assert "License-Expression: Apache-2.0" in zipfile.ZipFile(wheel).read(metadata).decode()


def test_import_needs_only_the_core_and_changes_no_setting():
  code = (
    "import sys, jax; before = dict(jax.config.values); import gpo_jax; "
    "assert dict(jax.config.values) == before; "
    "assert not jax._src.xla_bridge.backends_are_initialized(); "
    "print(*sorted({'flax', 'tqdm', 'matplotlib', 'pytest', 'torch'} & set(sys.modules)))"
  )
  assert not run(sys.executable, "-c", code, cwd=ROOT)


def test_everything_public_is_documented():
  init = ast.parse((ROOT / "gpo_jax/__init__.py").read_text())
  names = [a.asname for n in init.body if isinstance(n, ast.ImportFrom) for a in n.names]
  assert names
  for name in names:
    assert getattr(gpo_jax, name).__doc__, name


def test_the_changelog_knows_the_version():
  assert f"## {gpo_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.filterwarnings("default")
def test_the_readmes_python_blocks_print_what_they_say():
  assert blocks_of(ROOT / "README.md")
  for printed, written in printed_and_written(ROOT / "README.md"):
    assert printed == written


def test_what_the_pages_list_is_the_codes():
  run(sys.executable, ROOT / "docs/tables.py", "--check")


def test_every_preset_is_exported():
  for name in gpo_jax.presets.PRESETS:
    line = f"from gpo_jax.presets import {name} as {name}"
    assert hasattr(gpo_jax, name), f"gpo_jax/__init__.py misses: {line}"


def test_the_version_is_the_citations():
  assert f"version: {gpo_jax.__version__}" in (ROOT / "CITATION.cff").read_text()


def test_the_readmes_links_and_commands_exist():
  for link in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
    page, _, anchor = link.partition("#")
    assert (ROOT / page).exists(), link
    headings = re.findall(r"^#+ (.+)", (ROOT / page).read_text(), re.MULTILINE) if anchor else []
    assert anchor in ["", *(re.sub(r"[^\w ]", "", h).lower().replace(" ", "-") for h in headings)]
  makefile = (ROOT / "Makefile").read_text()
  for target in re.findall(r"^make ([a-z-]+)", README, re.MULTILINE):
    assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_messages_are_ascii_for_any_terminal():
  documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
  for file in (ROOT / "gpo_jax").rglob("*.py"):
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    docstrings = {ast.get_docstring(n, clean=False) for n in nodes if isinstance(n, documented)}
    if file.parent.name == "diagnosis":  # whose report and figure have symbols, its errors not
      nodes = [n for node in nodes if isinstance(node, ast.Raise) for n in ast.walk(node)]
    strings = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert "".join(strings - docstrings).isascii(), file
