"""How tests compile: small models take longer to compile than to run, so with few optimisations.

PERCEIVER_AR_TESTS=optimized compiles as users do; `make test-fast` sets it.
"""

import os
from importlib import metadata

QUICK_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
USUAL_OPTIONS = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
if metadata.version("jax").startswith("0.10."):  # later versions emit fusions in one way only
    QUICK_OPTIONS["xla_cpu_use_fusion_emitters"] = False
    USUAL_OPTIONS["xla_cpu_use_fusion_emitters"] = True


def xla_flags(num_devices: int) -> str:
    """XLA_FLAGS of a process that runs tests on so many CPU devices."""
    flags = [f"--xla_force_host_platform_device_count={num_devices}"]
    if os.environ.get("PERCEIVER_AR_TESTS") != "optimized":
        flags += [f"--{name}={value}".lower() for name, value in QUICK_OPTIONS.items()]
    return " ".join(flags)
