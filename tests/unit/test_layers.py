"""Each module imports only from the layers below its own."""

import ast
import pathlib

import gpo_jax

PACKAGE = pathlib.Path(gpo_jax.__file__).parent
LAYERS = [
  {"_ranges", "_numerics", "_segments", "_mesh"},
  {"_inputs", "traits"},
  {"types"},
  {"_padding", "_slots"},
  {"surrogates", "levels", "divergences", "weightings", "advantages", "vocabulary"},
  {"corrections", "log_probs", "metrics"},
  {"objective", "specification"},
  {"presets"},
  {"linear"},
  {"training", "integrations", "__init__"},
]
HEIGHT = {name: i for i, layer in enumerate(LAYERS) for name in layer}
LINEAR = [
  {"head"},
  {"forward"},
  {"backward"},
  {"mesh"},
  {"sweep"},
  {"two_passes"},
  {"one_pass"},
  {"api"},
  {"__init__"},
]


def imports(path: pathlib.Path) -> set[str]:
  """Finds the modules of the package that a file imports, as dotted names below it."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gpo_jax"):
      below = node.module.removeprefix("gpo_jax").removeprefix(".")
      names = {alias.name for alias in node.names}
      found |= (
        {below} if below not in ("", "linear") else {f"{below}.{x}".strip(".") for x in names}
      )
  return found


def test_modules_import_from_below():
  for path in PACKAGE.rglob("*.py"):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for name in imports(path) - {"", own}:
      other = name.partition(".")[0]
      if other != own:
        assert HEIGHT[other] < HEIGHT[own] or own == "__init__", f"{path.name} imports {name}"


def test_the_linear_path_imports_from_below():
  height = {name: i for i, layer in enumerate(LINEAR) for name in layer}
  for path in (PACKAGE / "linear").glob("*.py"):
    for name in imports(path):
      package, _, other = name.partition(".")
      if package == "linear":
        assert height[other] < height[path.stem], f"{path.name} imports {name}"


def test_every_module_has_a_layer():
  assert {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()} >= set(HEIGHT)
  modules = {p.stem for p in PACKAGE.glob("*.py")} | {"linear", "integrations"}
  assert modules == set(HEIGHT)
