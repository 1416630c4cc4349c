"""Writes the address of the published repository where it belongs.

    python tools/set_repository.py https://github.com/OWNER/NAME

Into setup.cfg (from where setup.py makes the links of README.md absolute, for PyPI), CITATION.cff,
CONTRIBUTING.md and the notebooks, which get an "Open in Colab" badge. Until then they have none: a
fork sets its own. Calling it again replaces the address.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+)")
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="https://github.com/OWNER/NAME")
    address = parser.parse_args().address.removesuffix("/").removesuffix(".git")
    if not (match := ADDRESS.fullmatch(address)):
        line = f"{address!r} is not the address of a repository, https://github.com/OWNER/NAME"
        print(f"set_repository.py: {line}", file=sys.stderr)
        return 2
    replace("setup.cfg", r"^( +Repository = .*\n)?( +Paper = )", rf"    Repository = {address}\n\2")
    replace(
        "CITATION.cff",
        r"^(repository-code: .*\n)?(license: )",
        rf"repository-code: {address}\n\2",
    )
    replace("CONTRIBUTING.md", r"^(    git clone )\S+", rf"\1{address}")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        write_into_notebook(path, address, match[1])
    return 0


def replace(name: str, pattern: str, by: str) -> None:
    text, count = re.subn(pattern, by, (ROOT / name).read_text(), count=1, flags=re.MULTILINE)
    assert count == 1, f"{name} has no line for the address"
    (ROOT / name).write_text(text)


def write_into_notebook(path: Path, address: str, repository: str) -> None:
    notebook = json.loads(path.read_text())
    title, install = notebook["cells"][:2]
    link = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{path.name}"
    lines = [line for line in title["source"] if not line.startswith(BADGE)]
    if len(lines) == len(title["source"]):
        lines[1:1] = ["\n"]
    title["source"] = [*lines[:2], f"{BADGE}({link})\n", *lines[2:]]
    install["source"] = [
        re.sub(r'^REPOSITORY = "[^"]*"', f'REPOSITORY = "{address}"', line)
        for line in install["source"]
    ]
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
