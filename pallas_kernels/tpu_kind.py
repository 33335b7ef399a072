"""Which TPU a program is traced for, and what a table says of it.

Tables are by the names that JAX gives the chips: "v5e", "v5p", "v6e", "7x".
"""

from collections.abc import Mapping
from typing import TypeVar

from jax.experimental.pallas import tpu as pltpu

Entry = TypeVar("Entry")


def traced_for() -> str | None:
    """Returns the name of the chip, or None where it cannot be known.

    It is that of the mesh in the context, also of one of devices that are only compiled for, else of the default
    device. Lowering for a TPU outside a mesh on a machine without one leaves it unknown.
    """
    try:
        return str(pltpu.get_tpu_info().chip_version)
    except ValueError:  # the device is no TPU
        return None


def choose(table: Mapping[str, Entry], default: Entry) -> Entry:
    """Returns the entry of the chip that is traced for; `default` for one that the table lacks, and an unknown one."""
    return table.get(traced_for() or "", default)
