"""Generates what the pages list from the code: `make readme`.

Between `<!-- presets -->` and `<!-- /presets -->` goes the table of the presets' slots, between
`<!-- presets-reference -->` and `<!-- /presets-reference -->` the list that Sphinx reads, and
between `<!-- ranges -->` and `<!-- /ranges -->` the ranges of all numbers.
"""

import argparse
import inspect
import pathlib
import re
import sys

from gpo_jax import levels, surrogates
from gpo_jax._ranges import RANGES
from gpo_jax.objective import Objective
from gpo_jax.presets import PRESETS

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs/api/presets.md"]
SLOTS = ("advantage", "level", "surrogate", "divergence", "weighting")
HEAD = "| preset | advantage | ratio level | surrogate (× correction) | divergence | weighting |"


def functions(slot) -> str:
  """Names the functions of a slot, which holds one, a tuple or None."""
  filled = slot if isinstance(slot, tuple) else (slot,)
  return ", ".join(f"`{one.func.__name__}`" for one in filled if one is not None) or "–"


def linked(name: str) -> str:
  """Links a preset to the first paper of its reference."""
  reference = PRESETS[name].__doc__.partition("Reference:")[2]
  number = re.search(r"arXiv:(\d{4}\.\d{5})", reference)
  target = f"https://arxiv.org/abs/{number[1]}" if number else "written_objective.md"
  return f"[`{name}`]({target})"


def objective_of(name: str) -> Objective:
  """Makes a preset with its paper's numbers, and 1,024 for one that has no default."""
  parameters = inspect.signature(PRESETS[name]).parameters.values()
  return PRESETS[name](**{p.name: 1024 for p in parameters if p.default is p.empty})


def row(name: str) -> str:
  """Makes a preset's row of the table."""
  objective = objective_of(name)
  slots = {slot: functions(getattr(objective, slot)) for slot in SLOTS}
  if objective.corrections:
    slots["surrogate"] += f" × {functions(objective.corrections)}"
  return f"| {linked(name)} | {' | '.join(slots.values())} |"


def table() -> str:
  """Makes the table of presets."""
  return "\n".join([HEAD, "|---" * HEAD.count(" |") + "|", *map(row, PRESETS)])


def group(name: str) -> str:
  """Sorts a preset by what sets it apart, seen in its slots."""
  objective = objective_of(name)
  if objective.advantage is None:
    return "With a critic or a teacher"
  if objective.corrections:
    return "For stale samples"
  if objective.level.func is not levels.token:
    return "One ratio per response"
  return "On-policy" if objective.surrogate.func is surrogates.reinforce else "One ratio per token"


def equation(slot) -> str:
  """Finds a slot function's equation: the first indented line of its docstring."""
  line = re.search(r"\n\n    +(\S.*)", slot.func.__doc__)[1]
  return line.partition("      ")[0].replace("   ", " ")


def equations(name: str) -> str:
  """Lists the equations of a preset, each beside the function that has it."""
  objective = objective_of(name)
  filled = [getattr(objective, slot) for slot in SLOTS] + list(objective.corrections)
  functions = {slot.func: equation(slot) for slot in filled if slot is not None}
  lines = [".. list-table::", "   :class: equations", ""]
  for function, written in functions.items():
    module = function.__module__.split(".")[1]
    link = f":py:obj:`{module}.{function.__name__} <gpo_jax.{module}.{function.__name__}>`"
    lines += [f"   * - {link}", f"     - ``{written}``"]
  return "\n".join(f"   {line}".rstrip() for line in lines)


def reference() -> str:
  """Makes the presets' part of the reference, in groups."""
  groups = {}
  for name in PRESETS:
    entry = f".. autofunction:: {name}\n\n{equations(name)}"
    groups.setdefault(group(name), [".. currentmodule:: gpo_jax"]).append(entry)
  blocks = {title: "\n\n".join(entries) for title, entries in groups.items()}
  return "\n\n".join(f"## {title}\n\n```{{eval-rst}}\n{x}\n```" for title, x in blocks.items())


def ranges() -> str:
  """Makes the table of ranges."""
  rows = [f"| `{name}` | {limits} | {limits.usual} |" for name, limits in RANGES.items()]
  return "\n".join(["| number | range | usually |", "|---|---|---|", *rows])


def main() -> None:
  """Writes the pages, or checks them only."""
  parser = argparse.ArgumentParser(description=main.__doc__)
  parser.add_argument("--check", action="store_true", help="exit with 1 if a page would change")
  check = parser.parse_args().check
  blocks = {"presets": table(), "presets-reference": reference(), "ranges": ranges()}
  found = set()
  for page in PAGES:
    text = written = page.read_text(encoding="utf-8")
    for name, content in blocks.items():
      between = rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)"
      if match := re.search(between, text, re.DOTALL):
        text = f"{text[: match.start()]}\n{content}\n\n{text[match.end() :]}"
        found.add(name)
    if text != written and check:
      sys.exit(f"{page.relative_to(ROOT)} differs from the code: run `make readme`")
    if text != written:
      page.write_text(text, encoding="utf-8")
  if found != set(blocks):
    sys.exit(f"no page has the markers {', '.join(set(blocks) - found)}")


if __name__ == "__main__":
  main()
