"""Where the time of a TPU's step goes, by the estimates that its compiler writes into a compiled program.

They are for what the compiler makes itself: a Pallas kernel has none, and its time follows from its schedule
(`python -m pallas_kernels.tools.schedule`). They have not been compared with a device. Of use is what they say of two
programs, and which part is long for what it computes.
"""

import collections
import re
from collections.abc import Iterator
from typing import NamedTuple

_PART = re.compile(r"\b(attention|memory|mlp|input_norm|mlp_norm|final_norm|loss|optimizer|embed)\b")
_OTHER = "elsewhere"


class Estimate(NamedTuple):
    """Cycles of a device by part, of the part's products and of all else; and how often each kernel runs."""

    products: collections.Counter[str]
    rest: collections.Counter[str]
    kernels: collections.Counter[str]

    def add(self, other: "Estimate", times: int = 1) -> None:
        """Adds what another program takes, run so many times."""
        for counter, more in zip(self, other, strict=True):
            counter.update({key: times * count for key, count in more.items()})

    def total(self) -> int:
        """Cycles outside kernels."""
        return self.products.total() + self.rest.total()


def read(*texts: str) -> Estimate:
    """The estimates in optimised HLO for TPUs, of several programs together; of other devices there are none.

    The body of a loop counts as often as it runs, and of a conditional the shortest branch: the other ones of a step
    are for what seldom happens.
    """
    found = _nothing()
    for text in texts:
        found.add(_of(*_computations(text)))
    return found


def lines(estimate: Estimate) -> list[str]:
    """A table of the parts, the longest first, and of the kernels; nothing where there are no estimates."""
    if not estimate.total():
        return []
    parts = sorted({*estimate.products, *estimate.rest}, key=lambda p: -estimate.products[p] - estimate.rest[p])
    rows = (f"  {part:28} {estimate.products[part] / 1e6:9.1f} {estimate.rest[part] / 1e6:9.1f}" for part in parts)
    kernels = ", ".join(f"{count} {name}" for name, count in sorted(estimate.kernels.items()))
    return [
        f"outside of kernels, by the compiler's estimates: {estimate.total() / 1e6:,.1f} million cycles of a device",
        f"  {'':28} {'products':>9} {'all else':>9}",
        *rows,
        f"kernels, which have no estimates: {kernels or 'none'}",
    ]


def _nothing() -> Estimate:
    return Estimate(collections.Counter(), collections.Counter(), collections.Counter())


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The instructions of each computation of a module by its name, and the name of the first to run."""
    program, entry, inside = dict[str, list[str]](), "", list[str]()
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) ", line)):
            inside = program[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line.startswith("  "):
            inside.append(line)
    return program, entry


def _of(program: dict[str, list[str]], name: str) -> Estimate:
    """The estimates of one computation and of those that it calls."""
    found = _nothing()
    for line in program.get(name, ()):
        if " while(" in line:
            found.add(_of(program, _named(line, "body")), _trips(program, line))
        elif " conditional(" in line:
            found.add(min((_of(program, branch) for branch in _branches(line)), key=Estimate.total))
        elif cycles := re.search(r'"estimated_cycles":"(\d+)"', line):
            counter = found.products if "dot_general" in line else found.rest
            counter[_part(program, line)] += int(cycles[1])
        elif '"tpu_custom_call"' in line:
            found.kernels[re.sub(r"[.\d]*$", "", line.split()[0].lstrip("%"))] += 1
    return found


def _named(line: str, what: str) -> str:
    found = re.search(rf"\b{what}=%([\w.\-]+)", line)
    return found[1] if found else ""


def _branches(line: str) -> Iterator[str]:
    for group in re.findall(r"(?:true|false)_computation=(%[\w.\-]+)|branch_computations=\{([^}]*)\}", line):
        yield from re.findall(r"%([\w.\-]+)", "".join(group))


def _trips(program: dict[str, list[str]], line: str) -> int:
    """How often a loop runs: the constant that its condition compares with."""
    condition = program.get(_named(line, "condition"), ())
    return max((int(found) for one in condition for found in re.findall(r"constant\((\d+)\)", one)), default=1)


def _part(program: dict[str, list[str]], line: str) -> str:
    """The part that an instruction belongs to: by its own name, or else by those of what it fuses."""
    for one in (line, *program.get(_named(line, "calls"), ())):
        names = re.search(r'op_name="([^"]*)"', one)
        if names and (found := _PART.search(names[1])):
            return found[1]
    return _OTHER
