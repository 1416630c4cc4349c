"""What setup.cfg cannot say: the presets of configs/ are a package of the wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["perceiver_ar_jax*"]), "perceiver_ar_jax.configs"],
    package_dir={"perceiver_ar_jax.configs": "configs"},
)
