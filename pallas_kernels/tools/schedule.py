"""The TPU compiler's own schedule of a kernel, read without a TPU: bundles, one a cycle, and what each of them uses.

    python -m pallas_kernels.tools.schedule v6e memory --dim 64 --chunk 2048
    python -m pallas_kernels.tools.schedule v5e attention --dim 128 --dtype float32
    python -m pallas_kernels.tools.schedule v5e decode --dim 128 --length 4224 --kv-heads 8
    python -m pallas_kernels.tools.schedule v5e prefill --dim 128 --length 4224

Bodies of loops count once and branches one after the other, so `bundles` is the length of the program, not its time.
`main` is what lies between the first and the last bundle that uses a matrix unit: the work on one block of tokens (of
attention, both ways to treat a block: with a mask and without). `floor` is what the matrix units alone would need for
the products of the memory, or of a piece of a prompt, on such a block, all of them busy in every cycle; of the decode
step it is what HBM needs to give a block of the cache, and `main` has to be less.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

# Of a core: (side of a matrix unit, units, rows that each takes in a cycle of bfloat16), from the published peaks.
UNITS = {"v5e": (128, 4, 1), "v5p": (128, 4, 1), "v6e": (256, 2, 2), "tpu7x": (256, 2, 2)}
# Of a core: bytes that HBM gives in a cycle, from the published bandwidths and the clocks that those peaks imply.
HBM = {"v5e": 546, "v5p": 790, "v6e": 937, "tpu7x": 1677}
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


def memory_floor(device: str, tokens: int, width: int, wide: int, backward: bool) -> float:
    """Returns the least cycles for one block of the memory in bfloat16.

    Args:
      device: a key of `UNITS`.
      tokens: T of a block.
      width, wide: C and F, columns of tokens and of hidden units of a pack.
      backward: which pass.
    """
    up, down, outer = (tokens, width, wide), (tokens, wide, width), (width, tokens, wide)
    return products_floor(device, [up] * 9 + [down] * 8 + [outer] * 6 if backward else [up] * 5 + [down] + [outer] * 3)


def products_floor(device: str, products: Sequence[tuple[int, int, int]]) -> float:
    """Returns the least cycles for products in bfloat16, each (rows, shared, columns), on a key of `UNITS`."""
    side, units, rate = UNITS[device]
    rows = sum(rows * math.ceil(shared / side) * math.ceil(columns / side) for rows, shared, columns in products)
    return rows / (units * rate)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", help="v5e, v5p, v6e, tpu7x, or libtpu's name of a topology")
    parser.add_argument("kernel", choices=("memory", "attention", "decode", "prefill"))
    parser.add_argument("--dim", type=int, default=64, help="of a head")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--chunk", type=int, default=2048, help="tokens per update of the memory")
    parser.add_argument("--length", type=int, default=32768, help="tokens of a row, or slots of a cache")
    parser.add_argument("--kv-heads", type=int, default=8, help="key heads of the decode step")
    return parser.parse_args()


def main() -> None:
    """Compiles forward and backward pass of one kernel and prints a line of JSON for each program."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        # Before libtpu is loaded, so before anything of JAX is imported.
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        os.environ["JAX_PLATFORMS"] = "cpu"
        from pallas_kernels.tools import compiling

        shape = (arguments.device, arguments.dim, arguments.dtype, arguments.length)
        of_kernel: Any = {
            "memory": {"chunk": arguments.chunk},
            **dict.fromkeys(("decode", "prefill"), {"kv_heads": arguments.kv_heads}),
        }
        compiled = getattr(compiling, arguments.kernel)(*shape, **of_kernel.get(arguments.kernel, {}))
        analysis: Any = compiled.memory_analysis()
        for schedule in read(pathlib.Path(folder), "ttt" if arguments.kernel == "memory" else "swa"):
            line = vars(arguments) | {"temporary_bytes": analysis.temp_size_in_bytes} | dataclasses.asdict(schedule)
            if arguments.kernel == "memory" and arguments.dtype == "bfloat16" and arguments.device in UNITS:
                line |= _block(arguments, "backward" in schedule.kernel)
            if arguments.kernel == "decode" and arguments.device in HBM:
                line |= _slots(arguments)
            if arguments.kernel == "prefill" and arguments.device in UNITS:
                line |= _keys(arguments)
            print(json.dumps(line), flush=True)


def _block(arguments: argparse.Namespace, backward: bool) -> dict[str, float]:
    """The block of the memory that `main` is about: its tokens, heads and floor."""
    from pallas_kernels.ttt import pallas_tpu, tpu_layout

    tiles = pallas_tpu.TILES[arguments.device.removeprefix("tpu")]
    heads, hidden = max(512 // arguments.dim, 1), 2 * arguments.dim
    layout = tpu_layout.make_layout(
        (1, arguments.length, heads, arguments.dim),
        hidden,
        arguments.chunk,
        True,
        False,
        tiles.backward if backward else tiles.forward,
        tiles.vmem_bytes,
    )
    floor = memory_floor(arguments.device, layout.tokens, *layout.wide, backward)
    return {"tokens": layout.tokens, "heads": layout.pack, "floor": floor}


def _slots(arguments: argparse.Namespace) -> dict[str, float]:
    """The block of the cache that `main` is about: its slots, and the cycles in which HBM gives its keys and values."""
    import jax

    from pallas_kernels.swa import decode_tpu

    cache = jax.ShapeDtypeStruct((1, 1, arguments.length, arguments.kv_heads, arguments.dim), arguments.dtype)
    size = decode_tpu.block_slots(cache)
    bytes_read = 2 * size * arguments.kv_heads * arguments.dim * cache.dtype.itemsize
    return {"tokens": size, "floor": bytes_read / HBM[arguments.device]}


def _keys(arguments: argparse.Namespace) -> dict[str, float]:
    """The block of keys that `main` is about, and the least cycles for its two products with 512 columns of queries."""
    from pallas_kernels.swa import prefill_tpu

    size, dim = prefill_tpu.KEYS, arguments.dim
    return {"tokens": size, "floor": products_floor(arguments.device, [(size, dim, 512), (dim, size, 512)])}


if __name__ == "__main__":
    main()
