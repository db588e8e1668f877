"""Lays out results as Markdown."""

MEGABYTE = 1e6
MEMORY = (
  "Temporary is what XLA allocates besides inputs and outputs; outputs are the loss and its "
  "gradients. Peak RSS is that of a process that runs this contestant once, with interpreter and "
  "inputs."
)


def table(header: list[str], rows: list[list[str]]) -> str:
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _time(seconds: float) -> str:
  return f"{1e3 * seconds:.3f} ms" if seconds < 1e-2 else f"{1e3 * seconds:.0f} ms"


def _megabytes(row: dict, key: str) -> str:
  return f"{row[key] / MEGABYTE:.0f}" if key in row else "–"


def _line(row: dict, keys: list[str]) -> list[str]:
  compilation = f"{row['compile_seconds']:.2f}" if "compile_seconds" in row else "–"
  ratios = [f"{ratio:.2f}" for ratio in row["ratios"].values()]
  memory = [_megabytes(row, key) for key in keys]
  return [row["contestant"], _time(row["seconds"]), *ratios, compilation, *memory]


def measured(result: dict) -> str:
  """Lays out one workload at one size."""
  rows, size = result["rows"], ", ".join(f"{n} {name}" for name, n in result["size"].items())
  columns = {
    "temporary_bytes": "temporary MB",
    "output_bytes": "output MB",
    "peak_bytes": "peak RSS MB",
  }
  columns = {key: name for key, name in columns.items() if any(key in row for row in rows)}
  units = [f"of {unit.split(':')[0]}" for unit in rows[0]["ratios"]]
  header = ["contestant", "median", *units, "compile s", *columns.values()]
  least = min(row["rounds"] for row in rows)
  parts = [
    f"## {result['title']}: {size}",
    f"float32; {least} rounds.",
    table(header, [_line(row, list(columns)) for row in rows]),
    MEMORY if "peak_bytes" in columns else "",
    "\n".join(f"Not run: {name} ({why})" for name, why in result["skipped"].items()),
  ]
  return "\n\n".join(part for part in parts if part)


def accuracy(rows: list[dict]) -> str:
  """Lays out the errors."""
  header = ["formula", "range of \\|d\\|", "relative error", "of the slope"]
  lines = [
    [
      row["contestant"],
      f"{row['above']:g} – {row['to']:g}",
      f"{row['value']:.1e}",
      f"{row['slope']:.1e}",
    ]
    for row in rows
  ]
  return "## D. e^d − d − 1 in float32 against float64\n\n" + table(header, lines)
