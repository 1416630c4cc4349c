"""What benchmarks say of the machine they ran on."""

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
