"""scripts/ci-container where no container can be run: it says why, and that nothing was tested."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts/ci-container"
LIMIT_S = 60
SKIPPED = 77


def ci_container(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it with these programs and the shell's own only."""
    for tool in ("bash", "dirname", "env"):
        if not (path / tool).exists():
            (path / tool).symlink_to(f"/usr/bin/{tool}")
    environment = {**os.environ, "PATH": str(path), "PYTHON": sys.executable}
    return subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=LIMIT_S)


def engine(path: Path, name: str, script: str) -> None:
    program = path / name
    program.write_text(f"#!/usr/bin/env bash\n{script}\n")
    program.chmod(0o755)


def test_without_an_engine_it_is_skipped(tmp_path: Path) -> None:
    done = ci_container(tmp_path)
    assert (done.returncode, done.stdout) == (SKIPPED, "")
    assert done.stderr == "ci-container: skipped: podman is not installed; docker is not installed\n"


def test_with_an_engine_that_does_not_answer_it_is_skipped(tmp_path: Path) -> None:
    engine(tmp_path, "docker", 'echo "Cannot connect to the daemon" >&2; exit 1')
    done = ci_container(tmp_path)
    assert done.returncode == SKIPPED
    assert done.stderr == (
        "ci-container: skipped: podman is not installed; docker info: Cannot connect to the daemon\n"
    )


def test_without_a_base_image_it_is_skipped(tmp_path: Path) -> None:
    """The engine answers, has no images, and no registry does."""
    engine(tmp_path, "podman", '[ "$1" = info ] && exit 0; echo "no such image" >&2; exit 125')
    done = ci_container(tmp_path, "--base", "localhost/nowhere:1")
    assert done.returncode == SKIPPED
    assert done.stderr.startswith("ci-container: skipped: there is no localhost/nowhere:1: ")


def test_an_image_that_cannot_be_built_is_a_failure(tmp_path: Path) -> None:
    engine(tmp_path, "podman", '[ "$1" = build ] && exit 3; exit 0')
    done = ci_container(tmp_path, "--only", "tests")
    assert (done.returncode, done.stderr) == (1, "ci-container: podman build --target test ended with status 3\n")


def test_what_it_does_not_know_is_a_usage_error(tmp_path: Path) -> None:
    assert ci_container(tmp_path, "--only", "everything").returncode == 2
