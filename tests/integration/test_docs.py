"""The pages of the documentation: their code prints what they say, their names and links exist."""

import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import gpo_jax
from tests.support.blocks import blocks_of, printed_and_written

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
GUIDE = ("migrating", "numerics", "semantics")


def pages(paths):
  return pytest.mark.parametrize("page", paths, ids=[page.stem for page in paths])


def test_the_guide_has_code():
  with_code = {page.stem for page in PAGES if blocks_of(page)}
  assert with_code.issuperset(GUIDE)


@pages([page for page in PAGES if blocks_of(page)])
@pytest.mark.filterwarnings("default")
def test_python_blocks_print_what_they_say(page):
  for printed, written in printed_and_written(page):
    assert printed == written


@pages(PAGES)
def test_a_text_block_follows_a_python_block(page):
  text = page.read_text()
  assert text.count("\n```text\n") == sum(bool(expected) for _, expected in blocks_of(page))


@pages(PAGES)
def test_names_are_public(page):
  for target in re.findall(r"\{py:\w+\}`~?([\w.]+)`", page.read_text()):
    assert target.startswith("gpo_jax."), target
    assert "._" not in target, target
    pkgutil.resolve_name(target)


@pages(PAGES)
def test_links_exist(page):
  for link in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
    notebook = (ROOT / link).with_suffix(".ipynb")  # which the site's build copies
    assert (page.parent / link).exists() or notebook.exists(), link


def test_every_public_name_has_its_place_in_the_reference():
  reference = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
  whole = set(re.findall(r"automodule:: (\S+)\n   :members:\n", reference))
  listed = set(re.findall(r"auto(?:function|class):: (\w+)", reference))
  for name in dir(gpo_jax):
    if not name.startswith("_") and not inspect.ismodule(getattr(gpo_jax, name)):
      assert name in listed, name
  for module in ("advantages", "corrections", "divergences", "levels", "surrogates", "weightings"):
    assert f"gpo_jax.{module}" in whole


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
  pytest.importorskip("myst_nb")
  command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going"]
  done = subprocess.run([*command, DOCS, tmp_path / "html"], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
