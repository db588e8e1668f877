"""The command line: `python -m gpo_jax.demo [--steps N] [--seed N] [--out FOLDER]`."""

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from gpo_jax.demo.config import Config

EXTRAS = ("flax", "matplotlib", "tqdm")
NOT_IMPROVED, USAGE, INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None, base: Config | None = None) -> int:
  """Runs the demonstration.

  Args:
    arguments: the command line, by default the process's.
    base: gives what the command line does not set, by default the recipe of `Config`.

  Returns:
    The exit status: 0 if reinforcement raised the held-out sampled accuracy, 1 if it did not,
    130 if the run was interrupted; what was recorded until then is written all the same.
  """
  options = parser().parse_args(arguments)
  require_extras()
  from gpo_jax.demo import report, run

  options.out.mkdir(parents=True, exist_ok=True)
  chosen = {"steps": options.steps, "seed": options.seed}
  record = run.Record(dataclasses.replace(base or Config(), **chosen))
  try:
    run.run(record)
  except KeyboardInterrupt:
    record.interrupted = True
  report.write(record, options.out)
  if record.interrupted:
    print("Interrupted: the report shows what was recorded until then.", file=sys.stderr)
    return INTERRUPTED
  if not report.improved(record):
    print("The held-out sampled accuracy did not improve.", file=sys.stderr)
    return NOT_IMPROVED
  return 0


def parser() -> argparse.ArgumentParser:
  """Makes the parser of the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m gpo_jax.demo",
    description="Train a small transformer to add two-digit numbers by group policy optimization, "
    "beside a supervised arm with as many updates. Takes about 3 minutes on 2 CPU cores; Ctrl-C "
    "keeps what was recorded.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument("--steps", type=positive, default=300, help="updates of each arm, at least 1")
  parser.add_argument("--seed", type=natural, default=0, help="seed of every random choice")
  parser.add_argument(
    "--out", type=folder, default=Path("demo-output"), help="folder for the picture and the metrics"
  )
  return parser


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
