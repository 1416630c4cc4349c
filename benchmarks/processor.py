"""What benchmarks say of the machine they ran on."""

import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path


def processor() -> str:
    """The processor's name, with its family and model, as virtual machines hide the name; cores."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", text, re.MULTILINE))
    name = fields.pop("model name", platform.machine())
    return ", ".join([name, *map(" ".join, fields.items()), f"{os.cpu_count()} cores"])


def conditions() -> dict[str, object]:
    """What figures depend on beside the code, for the JSON of a benchmark."""
    return {
        "processor": processor(),
        "jax": importlib.metadata.version("jax"),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "date": datetime.date.today().isoformat(),
    }
