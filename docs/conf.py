"""The documentation's settings: `make docs`."""

import pathlib
import re
import shutil

from sphinx.application import Sphinx

import gpo_jax
from gpo_jax._ranges import RANGES

HERE = pathlib.Path(__file__).parent
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", dirs_exist_ok=True)

project = "gpo_jax"
author = "The gpo_jax authors"
copyright = f"2026, {author}"
release = version = gpo_jax.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_nb"]
extensions += ["sphinxcontrib.katex"]  # which brings its script along: no network to read the site
katex_options = '{output: "mathml"}'  # set by the browser, with its own fonts
katex_css_path = "katex-math.css"
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
default_role = "py:obj"  # `name` in docstrings: a link where there is such a name
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # docstrings give shapes and ranges
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are committed with their outputs
nb_render_markdown_format = "myst"  # in outputs too: tables, formulas
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_theme = "furo"
html_title = f"gpo_jax {release}"
html_show_sphinx = False
html_copy_source = False


def keep_equations(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list):
  """Marks the equations of docstrings, indented by four, as text to be left alone."""
  section, result = False, []
  for i, line in enumerate(lines):
    section = section or line in ("Args:", "Attributes:", "Returns:", "Raises:", "Example:")
    starts = line.startswith("    ") and i and not lines[i - 1]
    if starts and not section:
      result += ["::", ""]
    result.append(line)
  lines[:] = result


def show_ranges(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list):
  """Adds the range of a number to its line among the arguments, from the table that checks it."""
  for i, line in enumerate(lines):
    match = re.match(r"    (\w+): ", line)
    limits = match and (RANGES.get(f"{name.split('.')[-1]}.{match[1]}") or RANGES.get(match[1]))
    if limits:
      lines[i] = f"    {match[1]}: in {limits}; {line[match.end() :]}"


def setup(app: Sphinx) -> None:
  """Called by Sphinx."""
  app.connect("autodoc-process-docstring", show_ranges, priority=0)
  app.connect("autodoc-process-docstring", keep_equations, priority=0)
