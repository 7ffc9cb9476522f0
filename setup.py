"""Which packages are installed; everything else about the project stands in pyproject.toml.

The native extension ``fastinvdpo._C`` will be listed here as ``ext_modules`` when ``csrc/`` holds sources.
"""

from pathlib import Path

from setuptools import find_packages, setup

packages = find_packages(include=["fastinvdpo", "fastinvdpo.*"])
package_dir = {}
# Triton kernels live outside the package's folder. kernels/ itself must not become a package: it would shadow the one
# that diffusers imports.
if any(Path("kernels/triton").glob("*.py")):
    packages.append("fastinvdpo._triton")
    package_dir["fastinvdpo._triton"] = "kernels/triton"

setup(packages=packages, package_dir=package_dir)
