"""The documentation's settings: `make docs`."""

import inspect
import operator
import pathlib
import re
import shutil

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

import gpo_jax
from gpo_jax._ranges import RANGES
from gpo_jax.presets import PRESETS

HERE = pathlib.Path(__file__).parent
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", dirs_exist_ok=True)

project = "gpo_jax"
author = "The gpo_jax authors"
copyright = f"2026, {author}"
release = version = gpo_jax.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_nb"]
extensions += ["sphinxcontrib.katex"]  # which brings its script along: no network to read the site
# Set by the browser, with its own fonts; which has no space after a function's name.
katex_options = r'{output: "mathml", macros: {"\\log": "\\operatorname{log}\\kern0.15em"}}'
katex_css_path = "katex-math.css"
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
default_role = "py:obj"  # `name` in docstrings: a link where there is such a name
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # signatures are as the source writes them: see `show_source`
maximum_signature_line_length = 62
napoleon_attr_annotations = False  # docstrings give shapes and ranges
napoleon_custom_sections = [("Attributes", "params_style")]
toc_object_entries_show_parents = "hide"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are committed with their outputs
nb_render_markdown_format = "myst"  # in outputs too: tables, formulas
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme = "furo"
html_title = f"gpo_jax {release}"
html_show_sphinx = False
html_copy_source = False


def keep_equations(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list):
  """Marks the equations of docstrings, indented by four, as text to be left alone."""
  section, result = False, []
  for i, line in enumerate(lines):
    section = section or line in ("Args:", "Attributes:", "Returns:", "Raises:", "Example:")
    equation = line.startswith("    ") and not section
    if equation and i and not lines[i - 1]:
      result += ["::", ""]
    result.append(line.replace("`", "") if equation else line)
  lines[:] = result


def link_spans(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list):
  """Makes links of `names` and of arXiv numbers, and code of everything else in backticks."""

  def span(match: re.Match) -> str:
    before, text, after = match.groups()
    # The arguments of this name are no links to the module.
    is_name = re.fullmatch(r"(?!advantages$)[A-Za-z_][\w.]*", text)
    joined = before + ("" if re.match(r"[\s(\[{\"'/:-]|$", before) else "\\ ")
    target = re.sub(r"^gpo\.(.+)", r"\g<0> <gpo_jax.\1>", text)
    joined += f"`{target}`" if is_name else f"``{' '.join(text.split())}``"
    return joined + ("\\ " if re.match(r"\w", after) else "")

  text = re.sub(r"(.|^)`([^`]+)`(?=(.|$))", span, "\n".join(lines), flags=re.DOTALL)
  text = re.sub(r"arXiv:(\d{4}\.\d{5})", r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", text)
  lines[:] = text.split("\n")


def show_ranges(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list):
  """Adds the ranges of numbers among the arguments, from the table that checks them."""
  own, documented = name.rpartition(".")[2], set()
  for i, line in enumerate(lines):
    match = re.match(r"  (\w+): ", line)
    limits = match and (RANGES.get(f"{own}.{match[1]}") or RANGES.get(match[1]))
    if limits:
      documented.add(match[1])
      if not re.search(r"(?<!A )[≥>] \d|in [\[(]", line):
        lines[i] = f"  {match[1]}: in {limits}; {line[match.end() :]}"
  if obj is PRESETS.get(own):
    keys = [key for key in inspect.signature(obj).parameters if key in RANGES.keys() - documented]
    missing = [f"  {key}: in {RANGES[key]}; {RANGES[key].usual}." for key in keys]
    if "Args:" in lines:
      start = lines.index("Args:") + 1
      lines[start:start] = missing
    elif missing:
      end = next(i for i, line in enumerate(lines) if re.match("Returns|Example|Reference", line))
      lines[end:end] = ["Args:", *missing, ""]


def show_source(
  app: Sphinx, what: str, name: str, obj: object, options: object, signature: str, result: str
):
  """Writes a signature as its source does: `Array`, not all that it is an alias of."""
  if what == "class":  # nobody calls a protocol, nor what has private fields
    return ("", None) if re.search(r"\*args|\b_", signature or "") else None
  pattern = r"def \w+\(\s*(?:self,?\s*)?(.*?),?\s*\)\s*->\s*(.*?):\n"
  match = what != "module" and re.search(pattern, inspect.getsource(inspect.unwrap(obj)), re.DOTALL)
  if not match:
    return None
  shown = [re.sub(r"\b(?:jax|chex)\.|[\"'](?=[A-Z])|(?<=\w)[\"']", "", x) for x in match.groups()]
  arguments, returned = (" ".join(text.split()) for text in shown)
  return f"({arguments})", returned


def link_code(app: Sphinx, doctree: nodes.document) -> None:
  """Links code in running text that names something public, such as `levels.token`."""
  for node in list(doctree.findall(nodes.literal)):
    name = re.sub(r"^gpo(_jax)?\.|\(.*", "", node.astext())
    function = operator.attrgetter(name) if re.fullmatch(r"[A-Za-z]\w*(\.\w+)?", name) else None
    try:
      public = function and callable(function(gpo_jax))
    except AttributeError:
      public = False
    inside = isinstance(node.parent, nodes.reference | nodes.title | pending_xref)
    # There a bare name is another library's option.
    inside |= app.env.docname == "migrating" and node.astext() == name and "." not in name
    if public and not inside and "=" not in node.astext():
      target = {"refdomain": "py", "reftype": "obj", "reftarget": f"gpo_jax.{name}"}
      node.replace_self(pending_xref("", node.deepcopy(), **target, refexplicit=True))


def setup(app: Sphinx) -> None:
  """Called by Sphinx."""
  app.connect("autodoc-process-docstring", show_ranges, priority=0)
  app.connect("autodoc-process-docstring", keep_equations, priority=0)
  app.connect("autodoc-process-docstring", link_spans, priority=0)
  app.connect("autodoc-process-signature", show_source)
  app.connect("doctree-read", link_code)
