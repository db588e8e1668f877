"""The pages of the documentation: their code prints what they say, their names and links exist."""

import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax
from gpo_jax import corrections, levels
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


@pytest.mark.quick("written_objective", "objectives", "troubleshooting", "migrating")
@pages([page for page in PAGES if blocks_of(page)])
@pytest.mark.filterwarnings("default")
def test_python_blocks_print_what_they_say(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)  # one page saves a batch
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


# --- what pages claim outside of their blocks ----------------------------------------------------


def text_of(page):
  """A page of the documentation, its lines joined."""
  return " ".join((DOCS / page).read_text().split())


def test_the_expressions_on_the_page_on_migrating_fit_their_slots():
  page = (DOCS / "migrating.md").read_text()
  expressions = re.findall(r"`((?:partial\(|gpo\.|lambda r)[^`]*)`", page)
  assert len(expressions) > 20
  known = {"partial": partial, "gpo": gpo_jax, "jnp": jnp, "mask": np.ones((1, 2, 3))}
  for expression in expressions:
    scope = vars(gpo_jax) | known | {"epsilon_high": 4.0}
    made = eval(expression.replace("…", "2.0"), scope)
    if isinstance(made, partial):
      module = made.func.__module__.removeprefix("gpo_jax.").partition(".")[0]
      slot = {"corrections": (made,)} if module == "corrections" else {module[:-1]: made}
      made = gpo_jax.dapo().replace(**slot)
    elif not isinstance(made, gpo_jax.Objective):
      made = gpo_jax.dapo().replace(advantage=made)
    assert isinstance(made, gpo_jax.Objective), expression


def test_the_defaults_of_mask_importance_are_those_on_the_page_on_migrating():
  parameters = inspect.signature(corrections.mask_importance).parameters
  low, high, level = (parameters[name].default for name in ("low", "high", "level"))
  assert (low, high, level) == (0.5, 5.0, levels.token)
  assert f"here {low}, {high} and the token's level" in text_of("migrating.md")


def test_bfloat16_rounds_as_the_page_on_numerics_says():
  def largest_rounding_error(start):
    x = np.linspace(start * 1.1, start, 10_001)
    return np.max(np.abs(x - x.astype(jnp.bfloat16).astype(float)))

  page = text_of("numerics.md")
  info = jnp.finfo(jnp.bfloat16)
  below, above = 1 - float(info.epsneg), 1 + float(info.eps)
  assert (below, above) == (1 - 1 / 256, 1 + 2 / 256)
  assert f"The numbers next to 1 are {below:.3f} and {above:.3f}" in page
  at_1, at_4 = largest_rounding_error(-1.0), largest_rounding_error(-4.0)
  np.testing.assert_allclose([at_1, at_4], [1 / 256, 1 / 64], rtol=1e-2)
  assert f"by up to {at_1:.3f} at −1 and {at_4:.3f} at −4" in page


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
  pytest.importorskip("myst_nb")
  command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going"]
  done = subprocess.run([*command, DOCS, tmp_path / "html"], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  presets = (tmp_path / "html/api/presets.html").read_text()
  assert "in [0, inf); weight of the divergence" in presets  # ranges, from their table
  assert "https://arxiv.org/abs/2402.03300" in presets
  assert "jax." not in re.sub(r"gpo_jax\.|<[^>]+>", "", presets)  # types read as Array
