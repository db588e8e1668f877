"""Each module imports only from the layers below its own."""

import ast
import itertools
import pathlib
import re

import pytest

import gpo_jax

PACKAGE = pathlib.Path(gpo_jax.__file__).parent
LAYERS = [
  {"_ranges", "_numerics", "_segments", "_mesh"},
  {"_inputs", "traits"},
  {"types"},
  {"_padding", "_slots"},
  {"surrogates", "levels", "divergences", "weightings", "advantages", "vocabulary"},
  {"evaluation", "corrections", "log_probs", "merging", "metrics"},
  {"objective", "specification"},
  {"presets"},
  {"linear"},
  {"training", "configuration", "diagnosis", "integrations", "__init__"},
]
HEIGHT = {name: i for i, layer in enumerate(LAYERS) for name in layer}
LINEAR = [
  {"head", "derivatives"},
  {"mesh"},
  {"forward"},
  {"backward"},
  {"chunks"},
  {"tiles"},
  {"two_passes"},
  {"one_pass", "selected", "distributions"},
  {"api"},
  {"__init__"},
]


DIAGNOSIS = [
  {"statistics", "checks"},
  {"evidence"},
  {"readings", "distances", "rollouts", "plot"},
  {"report"},
  {"api"},
  {"__init__"},
]


def imports(source: str) -> set[str]:
  """Finds the modules of the package that a source imports, as dotted names below it."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      dotted = {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"a relative import, line {node.lineno}"
      whole = node.module not in ("gpo_jax", "gpo_jax.linear", "gpo_jax.diagnosis")
      dotted = {node.module if whole else f"{node.module}.{alias.name}" for alias in node.names}
    else:
      continue
    own = {name for name in dotted if name.partition(".")[0] == "gpo_jax"}
    found |= {name.partition(".")[2] or "__init__" for name in own}
  return found


def test_every_kind_of_import_is_found():
  lines = ["import gpo_jax.levels as x", "from gpo_jax import traits", "import jax, gpo_jax_other"]
  lines += ["def f():", "  from gpo_jax.linear import api", "  from gpo_jax.presets import grpo"]
  lines += ["import gpo_jax as gpo"]
  assert imports("\n".join(lines)) == {"levels", "traits", "linear.api", "presets", "__init__"}


def test_modules_import_from_below():
  for path in PACKAGE.rglob("*.py"):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for name in imports(path.read_text()):
      other = name.partition(".")[0]
      if other != own:
        assert HEIGHT[other] < HEIGHT[own] or own == "__init__", f"{path.name} imports {name}"


@pytest.mark.parametrize(("package", "layers"), [("linear", LINEAR), ("diagnosis", DIAGNOSIS)])
def test_packages_import_from_below(package, layers):
  height = {name: i for i, layer in enumerate(layers) for name in layer}
  assert {path.stem for path in (PACKAGE / package).glob("*.py")} == set(height)
  for path in (PACKAGE / package).glob("*.py"):
    for name in imports(path.read_text()):
      own, _, other = name.partition(".")
      if own == package and other:
        assert height[other] < height[path.stem], f"{path.name} imports {name}"


def test_every_module_has_a_layer():
  assert {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()} >= set(HEIGHT)
  modules = {p.stem for p in PACKAGE.glob("*.py")}
  modules |= {"advantages", "corrections", "diagnosis", "integrations", "linear"}
  assert modules == set(HEIGHT)


def test_the_picture_shows_the_layers():
  picture = PACKAGE.parent / "docs/_static/layers.svg"
  rows = [row.split(" · ") for row in re.findall(r'"bold">(.*?)<', picture.read_text())]
  assert {name for row in rows for name in row} == set(HEIGHT) - {"__init__"}
  for above, below in itertools.pairwise(rows):
    assert min(map(HEIGHT.get, above)) > max(map(HEIGHT.get, below))
