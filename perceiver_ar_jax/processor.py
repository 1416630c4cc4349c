"""What this machine computes on, found without JAX and so before it starts."""

import os
import platform
import zlib
from pathlib import Path

ACCELERATORS = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")  # in /dev
BFLOAT16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}
CPU_INFO = Path("/proc/cpuinfo")


def computes_on_cpu() -> bool:
    """Whether JAX will run on the CPU: it is told to, or the machine has no accelerator."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not any(list(Path("/dev").glob(pattern)) for pattern in ACCELERATORS)


def fastest_dtype() -> str:
    """The dtype in which training is fastest: "float32" on a CPU without bfloat16 instructions.

    Everywhere else "bfloat16": its matrix products take half the time of float32's.
    """
    has_products = BFLOAT16_INSTRUCTIONS & set(_cpu_info().split())
    return "bfloat16" if has_products or not computes_on_cpu() else "float32"


def processor_id() -> int:
    """A number for what the processor can do."""
    lines = _cpu_info().splitlines()
    if not lines:
        return zlib.crc32(platform.processor().encode())
    wanted = ("flags", "Features", "model name")
    return zlib.crc32("".join(dict.fromkeys(x for x in lines if x.startswith(wanted))).encode())


def _cpu_info():
    try:
        return CPU_INFO.read_text()
    except OSError:  # not Linux
        return ""
