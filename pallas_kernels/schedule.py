"""The TPU compiler's own schedule of a kernel, read without a TPU: bundles, one a cycle, and what each of them uses.

    python -m pallas_kernels.schedule v6e memory --dim 64 --chunk 2048
    python -m pallas_kernels.schedule v5e attention --dim 128 --dtype float32

Bodies of loops count once and branches one after the other, so `bundles` is the length of the program, not its time.
`main` is what lies between the first and the last bundle that uses a matrix unit: the work on one block of tokens.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import tempfile
from typing import Any

SUFFIX = "final_hlo-static-per-bundle-utilization.txt"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What the compiler says of one kernel.

    Attributes:
      kernel: its name.
      bundles: of the whole program.
      main: between the first and the last that use a matrix unit, both included.
      mxu_share: of those, how many use a matrix unit.
      slots: mean number of slots that those fill, by unit, out of `capacity`.
      capacity: slots of a bundle, by unit.
    """

    kernel: str
    bundles: int
    main: int
    mxu_share: float
    slots: dict[str, float]
    capacity: dict[str, int]


def read(folder: pathlib.Path, name: str) -> list[Schedule]:
    """Returns the schedules of all kernels whose name contains `name`, from the compiler's dump in a folder."""
    return [_parse(path) for path in sorted(folder.glob(f"*{name}*{SUFFIX}"))]


def _parse(path: pathlib.Path) -> Schedule:
    """Reads one file: a line of units, one of capacities, one of words, then a line of slots used for each bundle."""
    lines = path.read_text().splitlines()
    units = [unit.strip() for unit in lines[1].split(",")]
    rows = [dict(zip(units, map(int, line.split()), strict=True)) for line in lines[4:] if line.strip()]
    busy = [i for i, row in enumerate(rows) if row["MXU"]]
    main = rows[busy[0] : busy[-1] + 1] if busy else []
    return Schedule(
        kernel=path.name.split("-", 1)[1].split(".")[0],
        bundles=len(rows),
        main=len(main),
        mxu_share=len(busy) / max(len(main), 1),
        slots={unit: sum(row[unit] for row in main) / max(len(main), 1) for unit in units},
        capacity=dict(zip(units, map(int, lines[2].split()), strict=True)),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", help="v5e, v5p, v6e, tpu7x, or libtpu's name of a topology")
    parser.add_argument("kernel", choices=("memory", "attention"))
    parser.add_argument("--dim", type=int, default=64, help="of a head")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--chunk", type=int, default=2048, help="tokens per update of the memory")
    parser.add_argument("--length", type=int, default=32768, help="tokens of a row")
    return parser.parse_args()


def main() -> None:
    """Compiles forward and backward pass of one kernel and prints a line of JSON for each program."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        # Before libtpu is loaded, so before anything of JAX is imported.
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        os.environ["JAX_PLATFORMS"] = "cpu"
        from pallas_kernels import compiling

        shape = (arguments.device, arguments.dim, arguments.dtype, arguments.length)
        if arguments.kernel == "memory":
            compiled = compiling.memory(*shape, arguments.chunk)
        else:
            compiled = compiling.attention(*shape)
        analysis: Any = compiled.memory_analysis()
        for schedule in read(pathlib.Path(folder), "ttt" if arguments.kernel == "memory" else "swa"):
            print(
                json.dumps(
                    vars(arguments) | {"temporary_bytes": analysis.temp_size_in_bytes} | dataclasses.asdict(schedule)
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
