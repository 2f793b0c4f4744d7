"""scripts/setup.sh for a project of the tests' own, which needs no package: which interpreter .venv is made from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "scripts/setup.sh"
LIMIT_S = 120

PYPROJECT = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "example"
version = "1"
"""

BACKEND = '''\
"""The smallest build backend: a wheel with nothing in it but its name."""
import zipfile


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = "example-1-py3-none-any.whl"
    with zipfile.ZipFile(f"{wheel_directory}/{name}", "w") as wheel:
        for file, text in {
            "METADATA": "Metadata-Version: 2.1\\nName: example\\nVersion: 1\\n",
            "WHEEL": "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
            "RECORD": "",
        }.items():
            wheel.writestr(f"example-1.dist-info/{file}", text)
    return name
'''


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "a project"
    (folder / "scripts").mkdir(parents=True)
    shutil.copy(SETUP, folder / "scripts")
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "backend.py").write_text(BACKEND)
    client = folder / "client/promisefs_client/fuse"
    client.mkdir(parents=True)
    for part_of_what_is_built in ("fuse_extension.c", "fuse_extension_build.py"):
        (client / part_of_what_is_built).touch()
    return folder


@pytest.fixture
def other_python(tmp_path: Path) -> Path:
    """Another interpreter than the one that runs this."""
    other = tmp_path / "python-of-another-place"
    shutil.copy(os.path.realpath(sys.executable), other)
    needs = "import os, sysconfig, ensurepip; open(os.path.join(sysconfig.get_path('include'), 'Python.h'))"
    if subprocess.run([other, "-c", needs], capture_output=True, check=False).returncode:
        pytest.skip("this interpreter cannot be copied, and there is no other one")
    return other


def setup(project: Path, python: str | Path = "") -> tuple[int, str]:
    environment = {**os.environ, "PYTHON": str(python), "PIP_NO_INDEX": "1"}
    done = subprocess.run(
        [project / "scripts/setup.sh"], env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    return done.returncode, done.stderr


def interpreter(project: Path) -> Path:
    return (project / ".venv/bin/python").resolve()


def test_which_interpreter(project: Path, other_python: Path) -> None:
    this = Path(os.path.realpath(sys.executable))
    status, said = setup(project, this)
    assert (status, interpreter(project)) == (0, this), said
    assert setup(project, this) == (0, "")
    assert setup(project) == (0, "")

    status, said = setup(project, other_python)
    assert (status, interpreter(project)) == (0, other_python), said
    assert "making .venv" in said
    assert setup(project, other_python) == (0, "")
    assert setup(project) == (0, "")

    (project / "pyproject.toml").write_text(PYPROJECT.replace("1", "2"))
    status, said = setup(project)
    assert (status, interpreter(project)) == (0, other_python), said
    assert "installing" in said and "making .venv" not in said

    status, said = setup(project, "no-such-python")
    assert (status, interpreter(project)) == (4, other_python)
    assert "PYTHON=no-such-python" in said
