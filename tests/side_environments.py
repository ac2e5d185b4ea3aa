"""Side environments: other versions of packages than ours, also of another Python, for a script of tests/side."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPTS = Path(__file__).parent / "side"


class SideEnvironments:
    """Runs scripts where these versions of packages hide those installed; each set of packages is installed once."""

    def __init__(self, root: Path) -> None:
        self._root, self._folders = root, dict[tuple[str, str], Path]()

    def __call__(self, script: str, argument: str, packages: str, python: str = "") -> dict[str, Any]:
        """The JSON that a script prints last. python: "3.12", where another than ours is needed, which then has these
        packages alone. The test is skipped where that, or a package, is not to be had."""
        interpreter = _python(python) if python else sys.executable
        environment = {**os.environ, "PYTHONPATH": str(self._installed(interpreter, packages))}
        command = [interpreter, str(SCRIPTS / script), argument]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def _installed(self, interpreter: str, packages: str) -> Path:
        if (interpreter, packages) not in self._folders:
            folder = self._root / str(len(self._folders))
            command = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries=1"]
            command += ["--no-deps", "--no-compile", "--target", str(folder), *packages.split()]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if done.returncode:
                pytest.skip(f"{packages} cannot be installed here: {done.stderr.strip()[-300:]}")
            if "torch==" in packages:  # NVIDIA's libraries, 3 GB, are the same for every Python
                (folder / "nvidia").symlink_to(Path(np.__file__).parents[1] / "nvidia")
            self._folders[interpreter, packages] = folder
        return self._folders[interpreter, packages]


def _python(version: str) -> str:
    """A Python of this version, on the PATH or of pyenv."""
    of_pyenv = sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python"))
    for found in [shutil.which(f"python{version}"), *map(str, of_pyenv)]:
        if found and subprocess.run([found, "-m", "pip", "--version"], capture_output=True).returncode == 0:
            return found
    pytest.skip(f"no Python {version} with pip is here")
