"""What setup.cfg cannot say: configs/ is a package, and where the links of README.md lead."""

import configparser
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def long_description() -> str:
    """README.md for PyPI, whose links must be absolute, if setup.cfg names the repository."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    urls = dict(line.split(" = ", 1) for line in config["metadata"]["project_urls"].split("\n")[1:])
    if "Repository" not in urls:
        return text
    version = re.search('__version__ = "(.*)"', (ROOT / "perceiver_ar_jax/_version.py").read_text())
    files = f"{urls['Repository']}/{{}}/v{version[1]}/"
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\g<1>{files.format('raw')}", text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:|#)", rf"\g<1>{files.format('blob')}", text)


setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["perceiver_ar_jax*"]), "perceiver_ar_jax.configs"],
    package_dir={"perceiver_ar_jax.configs": "configs"},
)
