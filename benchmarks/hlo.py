"""Reads optimized HLO, what a compiler made of a program: cycles, collectives and their trips."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_COLLECTIVE = re.compile(
  r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all)(-start)?"
)
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<rest>.*)")
_HEADER = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_ARRAY = re.compile(r"\b[a-z]+\d*\w*\[[\d,]*\](?:\{[^}]*\})?")
_STILL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "custom-call", "call",
          "while", "conditional", "after-all"}  # fmt: skip
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations|called_computations)=\{?([^\s}]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """An instruction: what it is called, what it makes, what it does, and the rest of its line."""

  name: str
  shape: str
  opcode: str
  rest: str

  def attribute(self, pattern: str) -> str | None:
    """Finds a part of the line."""
    found = re.search(pattern, self.rest)
    return found[1] if found else None

  @property
  def cycles(self) -> int:
    """Returns the compiler's own estimate; TPUs' compiler gives one."""
    return int(self.attribute(r'"estimated_cycles":"(\d+)"') or 0)

  @property
  def source(self) -> str:
    """Returns where in the program's source it is from, scopes included."""
    return self.attribute(r'op_name="([^"]*)"') or ""

  @property
  def called(self) -> list[str]:
    """Returns the names of the computations that it runs."""
    found = _CALLED.findall(self.rest)
    return [name.strip("%{},") for names in found for name in names.split(",") if name]


def size(shape: str) -> int:
  """Computes the bytes of a shape, of a tuple's parts together."""
  return sum(
    math.prod(int(n) for n in dims.split(",") if n) * int(bits or 8) // 8
    for bits, dims in re.findall(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", shape)
  )


class Collective(NamedTuple):
  """A collective: its kind, the bytes of its result on a device, and how often it runs."""

  kind: str
  bytes: int
  trips: int
  in_loop: bool


class Program:
  """A compiled program.

  Args:
    text: `compiled.as_text()`.
    trips: how often loops run whose number of trips the program does not know, by the
      `jax.named_scope` that they are directly in.
  """

  def __init__(self, text: str, trips: Mapping[str, int] | None = None):
    self._trips = trips or {}
    self._computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
      if header := _HEADER.match(line):
        current = self._computations[header["name"]] = []
        if header["entry"]:
          self._entry = header["name"]
      elif found := _INSTRUCTION.match(line):
        shape, rest = _split(found["rest"])
        opcode = rest.partition("(")[0]
        current.append(Instruction(found["name"], shape, opcode, rest))

  def instructions(self) -> Iterator[tuple[Instruction, int, bool]]:
    """Yields each instruction that runs, how often, and whether that is inside a loop."""
    return self._walk(self._entry, 1, False)

  def _walk(self, name: str, count: int, in_loop: bool) -> Iterator:
    for x in self._computations[name]:
      yield x, count, in_loop
      if x.opcode == "while":
        trips = self.trips(x)
        for part in ("condition", "body"):
          yield from self._walk(x.attribute(part + r"=%?([\w.-]+)") or "", count * trips, True)
      elif x.opcode in ("call", "conditional", "async-start"):
        for called in x.called:
          yield from self._walk(called, count, in_loop)
      elif x.opcode == "fusion":  # its cycles are its own; a collective may hide in it
        for y in (y for called in x.called for y in self._computations[called]):
          if _COLLECTIVE.fullmatch(y.opcode):
            yield dataclasses.replace(y, rest=""), count, in_loop

  def trips(self, loop: Instruction) -> int:
    """Returns how often a loop runs.

    Raises:
      ValueError: if nobody knows.
    """
    known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
    if known is not None:
      return int(known)
    for name, trips in self._trips.items():
      if loop.source.endswith(f"{name}/while"):
        return trips
    condition = self._computations[loop.attribute(r"condition=%?([\w.-]+)") or ""]
    constants = [x.attribute(r"constant\((\d+)\)") for x in condition if x.opcode == "constant"]
    if len(constants) == 1 and constants[0] is not None:
      return int(constants[0])
    raise ValueError(
      f"{loop.name} runs an unknown number of times; it is from {loop.source!r}: name it in trips"
    )

  def cycles(self) -> int:
    """Sums the compiler's estimates, loops by their trips. Collectives have none."""
    return sum(x.cycles * count for x, count, _ in self.instructions())

  def traffic(self) -> int:
    """Sums the bytes read from and written to main memory, loops by their trips.

    An operand is read whole, once per instruction. What a TPU's compiler keeps in the chip's own
    memory, `S(1)` in a layout, does not count, nor do custom calls.
    """
    shapes = {x.name: x.shape for body in self._computations.values() for x in body}
    total = 0
    for x, count, _ in self.instructions():
      if x.opcode.endswith("-start"):  # what it copies has two ends
        ends = _ARRAY.findall(x.shape)[:2]
        moved = min(map(size, ends)) * sum("S(" not in end for end in ends)
      elif x.opcode in _STILL or x.opcode.endswith("-done"):
        moved = 0
      else:
        names = dict.fromkeys(re.findall(r"%([\w.-]+)", x.rest.partition(")")[0]))
        arrays = _ARRAY.findall(" ".join([x.shape, *(shapes[name] for name in names)]))
        moved = sum(size(array) for array in arrays if "S(" not in array)
      total += moved * count
    return total

  def collectives(self) -> list[Collective]:
    """Lists collectives, alike ones together, the largest first."""
    found: collections.Counter = collections.Counter()
    for x, count, in_loop in self.instructions():
      if match := _COLLECTIVE.fullmatch(x.opcode):
        # What starts has its operands too: the last part of its tuple is the result.
        shape = _parts(x.shape)[-1] if match[2] else x.shape
        found[match[1], size(shape), in_loop] += count
    alike = [Collective(kind, size, trips, loop) for (kind, size, loop), trips in found.items()]
    return sorted(alike, key=lambda x: -x.bytes * x.trips)


def _split(text: str) -> tuple[str, str]:
  """Splits a shape, which may be a tuple, from what comes after it."""
  depth = 0
  for i, char in enumerate(text):
    depth += (char in "([{") - (char in ")]}")
    if char == " " and not depth:
      return text[:i], text[i + 1 :]
  return text, ""


def _parts(shape: str) -> list[str]:
  if not shape.startswith("("):
    return [shape]
  return [f"{kind}[{dims}]" for kind, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)]
