"""What is known of the accelerators that runs are planned for."""

import dataclasses

from perceiver_ar_jax.parallel.sharding import device_kind_in_use


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them; v4 and v5p with both cores as one (megacore)."""

    name: str
    device_kind: str  # what `jax.Device.device_kind` says
    peak_flops: float  # bfloat16, dense, per second. Source: the makers' data sheets
    memory_bytes: int  # what programs may use
    memory_bandwidth: float  # of HBM, bytes per second. Source: the makers' data sheets
    clock_hz: float | None  # of the TPU's matrix units: turns the compiler's cycles into seconds
    remat: str  # what `config.model.remat=auto` is on it


# On TPUs the attention kernel keeps no weights, and what else rematerialisation saves of c4_base is
# not needed: without it the step takes 0.83 to 0.88 of the compiler's cycles (docs/performance.md).
# On GPUs `auto` attention has no kernel, and the weights of 18 layers would not fit.
CHIPS = (
    Chip("v4", "TPU v4", 275e12, int(30.75 * 2**30), 1228e9, 1.05e9, "none"),
    Chip("v5e", "TPU v5 lite", 197e12, int(15.75 * 2**30), 819e9, 1.5e9, "none"),
    Chip("v5p", "TPU v5", 459e12, int(95.74 * 2**30), 2765e9, 1.75e9, "none"),
    Chip("v6e", "TPU v6 lite", 918e12, int(31.25 * 2**30), 1640e9, 1.75e9, "none"),
    Chip("h100", "NVIDIA H100 80GB HBM3", 989e12, 84929347584, 3350e9, None, "names"),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that calls itself so, or None."""
    return next((chip for chip in CHIPS if chip.device_kind == device_kind), None)


def remat_in_use(policy: str) -> str:
    """The policy itself; for "auto" that of the chip in use, "names" where none is known."""
    if policy != "auto":
        return policy
    chip = chip_of(device_kind_in_use())
    return chip.remat if chip else "names"
