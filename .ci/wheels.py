"""Wheels for several Pythons, which are the arguments: interpreters, or names on PATH. They go into ``dist``.

By pybind11 the extension binds to one minor version of Python, to PyTorch by the stable ABI alone. So this interpreter
builds them all, with its PyTorch; of the others it needs the headers. A wheel is tried where its Python has PyTorch.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
ASK = """
import importlib.util, json, sys, sysconfig
print(json.dumps({
    "tag": "cp%d%d" % sys.version_info[:2],
    "include": sysconfig.get_path("include"),
    "suffix": sysconfig.get_config_var("EXT_SUFFIX"),
    "torch": importlib.util.find_spec("torch") is not None,
}))
"""
TRY = "from fastinvdpo.ops import native; print(native.unavailable() or native.build_info())"


def output(*command: str | Path, **options) -> str:
    return subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True, **options).stdout


def build(python: str, folder: Path) -> None:
    """One wheel, in a folder that is empty: what an earlier build left would go into it."""
    try:
        found = json.loads(output(python, "-c", ASK))
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"PYTHONS: {python!r} does not run: {error}. Remedy: name an interpreter.") from None
    if not Path(found["include"], "Python.h").is_file():
        raise SystemExit(f"PYTHONS: {python!r} has no headers: {found['include']}/Python.h. Remedy: install them.")
    # CFLAGS come before the headers of this interpreter.
    flags = f"-I{found['include']} {os.environ.get('CFLAGS', '')}"
    settings = {"CFLAGS": flags, "SETUPTOOLS_EXT_SUFFIX": found["suffix"], "FASTINVDPO_BUILD": "1"}
    setup = ("setup.py", "-q", "build", f"--build-base={folder / 'build'}", "bdist_wheel", f"--dist-dir={folder}")
    output(sys.executable, "-W", "ignore", *setup, cwd=ROOT, env={**os.environ, **settings})
    (wheel,) = folder.glob("*.whl")
    tags = ("--remove", f"--python-tag={found['tag']}", f"--abi-tag={found['tag']}")
    output(sys.executable, "-m", "wheel", "tags", *tags, wheel)
    (wheel,) = folder.glob("*.whl")
    said = "not tried: it has no PyTorch"
    if found["torch"]:
        output(python, "-m", "zipfile", "-e", wheel, folder / "tried")
        said = output(python, "-c", TRY, cwd=folder / "tried").strip()
    DIST.mkdir(exist_ok=True)
    print(f"{wheel.replace(DIST / wheel.name)}: {said}", flush=True)


for name in sys.argv[1:]:
    with tempfile.TemporaryDirectory() as room:
        build(name, Path(room))
