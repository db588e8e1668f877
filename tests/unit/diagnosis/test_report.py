"""The report: read by a tired person, drawn, or as a table."""

import builtins
import dataclasses

import matplotlib.figure
import numpy as np
import pytest

from benchmarks import synthetic
from gpo_jax.diagnosis.checks import Check
from gpo_jax.diagnosis.report import Finding

HEALTHY = synthetic.make(synthetic.Setting(), 0)
FOUND = synthetic.SABOTAGES["old recomputed at each step"].make(synthetic.Setting(), 0).diagnose()


def test_nothing_found_is_said_in_one_line():
  line = str(dataclasses.replace(HEALTHY, ref_log_probs=None).diagnose())
  assert "\n" not in line
  count = f"{HEALTHY.mask.sum():,}"
  assert line.startswith(f"Nothing found in 64 responses, {count} tokens. Examined: shifted, ")
  assert line.endswith(" Not examined: reference (no ref_log_probs).")


def test_a_finding_says_what_to_do_and_why():
  text = str(FOUND)
  assert text.startswith("2 findings in 64 responses, ")
  joined = " ".join(text.split())
  for finding in FOUND.findings:
    assert f"{finding.severity.upper()} {finding.name}: {finding.evidence}." in joined
    for part in ("remedy", "limit", "source"):
      assert f"{part}: {getattr(finding, part)}" in joined
  assert "Nothing else found. Examined: shifted, placeholder," in joined
  assert max(map(len, text.splitlines())) <= 96
  assert FOUND.findings[0]._fields == Finding._fields
  assert set(Finding._fields) - {"evidence"} < set(Check._fields)


def test_errors_come_first():
  batch = synthetic.SABOTAGES["85% of groups dead"].make(synthetic.Setting(responses=512), 0)
  batch.sampler_log_probs = np.roll(batch.sampler_log_probs, 1, axis=-1)
  batch.ref_log_probs = np.where(batch.mask, batch.ref_log_probs - 30, 0)
  severities = [finding.severity for finding in batch.diagnose().findings]
  assert severities == ["error", "error", "warning", "warning"]


def test_the_table_has_a_row_for_each_number():
  rows = FOUND.table
  assert all(isinstance(value, float) for *_, value in rows)
  assert len({row[:3] for row in rows}) == len(rows)
  assert {row[0] for row in rows} <= set(FOUND.examined)
  fields = {row[1] for row in rows if row[0] == "shifted"}
  assert fields == {"old_log_probs", "sampler_log_probs", "ref_log_probs"}


@pytest.mark.parametrize("names", [synthetic.LOGS, synthetic.LOGS[:2], synthetic.LOGS[:1]])
def test_the_figure(names):
  gone = dict.fromkeys(set(synthetic.LOGS) - set(names))
  figure = dataclasses.replace(HEALTHY, **gone).diagnose().plot()
  assert isinstance(figure, matplotlib.figure.Figure)
  assert [len(axes.collections) for axes in figure.axes] == [len(names) - 1, 0, 0, 1]
  assert figure.get_suptitle() == "Nothing found"
  assert figure._repr_png_().startswith(b"\x89PNG")
  assert FOUND.plot().get_suptitle() == "clipping_off, mismatch"


def test_without_matplotlib_the_figure_says_so(monkeypatch):
  real = builtins.__import__

  def missing(name, *args, **kwargs):
    if name.startswith("matplotlib"):
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr("importlib.import_module", lambda name: missing(name))
  with pytest.raises(ImportError, match="plot needs matplotlib: pip install matplotlib"):
    FOUND.plot()
