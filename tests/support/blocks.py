"""The code blocks of a Markdown page, run in one session: what they print, what the page says."""

import contextlib
import io
import pathlib
import re
from collections.abc import Iterator

import jax

_BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n*```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)


def blocks_of(page: pathlib.Path) -> list[tuple[str, str]]:
  """Finds the python blocks of a page, and what the page says that they print."""
  return _BLOCK.findall(page.read_text())


def printed_and_written(page: pathlib.Path) -> Iterator[tuple[str, str]]:
  """Runs the python blocks of a page in order; one without a text block must print nothing."""
  namespace = {}  # one session: later blocks use what earlier ones defined
  for code, written in blocks_of(page):
    output = io.StringIO()
    users = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with contextlib.redirect_stdout(output), users[0], users[1]:
      exec(compile(code, page.name, "exec"), namespace)
    yield output.getvalue().strip(), written.strip()
