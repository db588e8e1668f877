"""Notebooks are committed with the outputs of one clean run, and run again."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path):
  return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def test_all_are_there():
  numbers = ", ".join(path.stem[:2] for path in NOTEBOOKS)
  assert numbers == "01, 02, 03, 04, 05, 06, 07, 08, 09, 10"


@each
def test_outputs_are_of_one_run_without_errors_warnings_and_paths(path):
  code = cells(path)
  assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
  outputs = [output for cell in code for output in cell["outputs"]]
  assert any("image/png" in output.get("data", {}) for output in outputs)
  assert not [output for output in outputs if output["output_type"] == "error"]
  assert not [output for output in outputs if output.get("name") == "stderr"]
  texts = [output.get("text", output.get("data", {}).get("text/plain", "")) for output in outputs]
  assert not re.search(r"(^|[\s'\"(])/(home|root|tmp|work|Users)/|Warning:", json.dumps(texts))


@each
def test_the_site_shows_all_of_the_text(path):
  for cell in json.loads(path.read_text())["cells"]:
    if cell["cell_type"] == "markdown":
      text = "".join(cell["source"])
      assert not re.search(r"^%", text, re.MULTILINE), text  # a comment of MyST's
      assert not re.search(r"\$[^$]*<[a-z]", re.sub(r"`[^`]*`", "", text)), text  # a tag of HTML


@each
def test_links_between_notebooks_lead_somewhere(path):
  for link in re.findall(r"\]\(([\w/.]+\.ipynb)", path.read_text()):
    assert (path.parent / link).exists(), link


@pytest.mark.slow
@each
def test_runs_again(path, tmp_path):
  pytest.importorskip("nbconvert")
  if path.stem == "06_pod":
    pytest.importorskip("libtpu")
  command = [sys.executable, "-m", "nbconvert", "--execute", "--to", "notebook"]
  done = subprocess.run(
    [*command, "--output-dir", tmp_path, path], capture_output=True, text=True, timeout=600
  )
  assert done.returncode == 0, done.stderr
