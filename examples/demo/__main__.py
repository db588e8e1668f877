"""The command line: `python -m examples.demo --help` says what it takes."""

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from .config import SUPERVISED, Config
from .objectives import PRESETS

EXTRAS = ("flax", "matplotlib", "tqdm")
NOT_IMPROVED, USAGE, INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None, base: Config | None = None) -> int:
  """Runs the demonstration.

  Args:
    arguments: the command line, by default the process's.
    base: gives what the command line does not set, by default the recipe of `Config`.

  Returns:
    The exit status: 0 if every objective raised the held-out sampled accuracy, 1 if one did not,
    130 if the run was interrupted; what was recorded until then is written all the same.
  """
  options = vars(parser().parse_args(arguments))
  require_extras()
  from . import report, run

  out = options.pop("out")
  out.mkdir(parents=True, exist_ok=True)
  record = run.Record(dataclasses.replace(base or Config(), **options))
  try:
    run.run(record)
  except KeyboardInterrupt:
    record.interrupted = True
  report.write(record, out)
  if record.interrupted:
    print("Interrupted: the report shows what was recorded until then.", file=sys.stderr)
    return INTERRUPTED
  if names := [arm.name for arm in record.reinforced() if not report.improved(arm)]:
    print(f"The held-out sampled accuracy did not improve: {', '.join(names)}.", file=sys.stderr)
    return NOT_IMPROVED
  return 0


def parser() -> argparse.ArgumentParser:
  """Makes the parser of the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m examples.demo",
    description="Train a small transformer to add two-digit numbers by group policy optimization, "
    "beside a supervised arm with as many updates, or compare objectives. Takes about 3 minutes on "
    "2 CPU cores, a comparison 1 to 2 minutes per objective; Ctrl-C keeps what was recorded.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  arms = parser.add_mutually_exclusive_group()
  arms.add_argument(
    "--objective",
    type=objective,
    dest="arms",
    default=argparse.SUPPRESS,
    metavar="NAME",
    help=f"preset of gpo_jax.presets to train with: {', '.join(PRESETS)} (default: gpo)",
  )
  arms.add_argument(
    "--compare",
    type=objectives,
    dest="arms",
    default=argparse.SUPPRESS,
    metavar="NAME,NAME",
    help="train with each of these from the same warm start, with the same seeds. Learning rate, "
    "batch and staleness were chosen for gpo, not for the others: no ranking",
  )
  parser.add_argument("--steps", type=positive, default=300, help="updates of each arm, at least 1")
  parser.add_argument("--seed", type=natural, default=0, help="seed of every random choice")
  parser.add_argument(
    "--out", type=folder, default=Path("demo-output"), help="folder for the picture and the metrics"
  )
  return parser


def objective(text: str) -> tuple[str, ...]:
  """Reads an objective's name into the arms of a run."""
  return _known(text), SUPERVISED


def objectives(text: str) -> tuple[str, ...]:
  """Reads objectives' names, separated by commas, into the arms of a comparison."""
  names = tuple(_known(name.strip()) for name in text.split(","))
  if len(set(names)) < len(names):
    raise argparse.ArgumentTypeError(f"needs each name once; got {text!r}")
  return names


def positive(text: str) -> int:
  """Reads a whole number of at least 1."""
  return _whole(text, 1)


def natural(text: str) -> int:
  """Reads a whole number of at least 0 that fits a seed."""
  return _whole(text, 0)


def folder(text: str) -> Path:
  """Reads the path of a folder, which may yet have to be made."""
  path = Path(text)
  if path.exists() and not path.is_dir():
    raise argparse.ArgumentTypeError(f"needs a folder; {text!r} is a file")
  return path


def _known(name: str) -> str:
  if name not in PRESETS:
    raise argparse.ArgumentTypeError(f"needs one of {', '.join(PRESETS)}; got {name!r}")
  return name


def _whole(text: str, least: int) -> int:
  if not (text.isdecimal() and least <= int(text) < 2**31):
    raise argparse.ArgumentTypeError(f"needs a whole number of at least {least}; got {text!r}")
  return int(text)


def require_extras() -> None:
  """Stops with the remedy if a package of the demo is not installed."""
  missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
  if missing:
    print(f'The demo also needs {", ".join(missing)}: pip install "gpo_jax[demo]"', file=sys.stderr)
    raise SystemExit(USAGE)


if __name__ == "__main__":
  sys.exit(main())
