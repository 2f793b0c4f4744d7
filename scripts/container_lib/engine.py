"""podman or docker, by its command line. Every command has a time limit."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ENGINES = ("podman", "docker")
COMMAND_S = 120.0
_INFO_S = 30.0


class Unusable(Exception):
    """Containers cannot be run here; the message says why."""


class EngineError(Exception):
    """A command failed; the message has what it said."""


@dataclass(frozen=True, slots=True)
class Engine:
    name: str

    def run(self, *arguments: str | Path, timeout_s: float = COMMAND_S, stdin: IO[bytes] | None = None) -> str:
        """Return what a command prints. Raise EngineError if it fails or takes longer."""
        command = self.command(*arguments)
        try:
            done = subprocess.run(
                command, stdin=stdin or subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s
            )
        except subprocess.TimeoutExpired:
            raise EngineError(f"{' '.join(command)}: not done after {timeout_s:g} s") from None
        if done.returncode:
            said = done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}"
            raise EngineError(f"{' '.join(command)}: {said[-2000:]}")
        return done.stdout

    def succeeds(self, *arguments: str | Path) -> bool:
        try:
            self.run(*arguments)
        except EngineError:
            return False
        return True

    def show(self, *arguments: str | Path, timeout_s: float) -> int:
        """Run a command with its output passed through; return its status. Raise EngineError if it takes longer."""
        try:
            return subprocess.run(
                self.command(*arguments), stdin=subprocess.DEVNULL, timeout=timeout_s, env=self._environment()
            ).returncode
        except subprocess.TimeoutExpired:
            raise EngineError(f"{self.name} {arguments[0]}: not done after {timeout_s:g} s") from None

    def spawn(self, *arguments: str | Path, stdout: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.command(*arguments), stdin=subprocess.DEVNULL, stdout=stdout)

    def command(self, *arguments: str | Path) -> list[str]:
        return [self.name, *map(str, arguments)]

    @staticmethod
    def _environment() -> dict[str, str]:
        # docker's older builder knows no secrets.
        return {**os.environ, "DOCKER_BUILDKIT": "1"}


def find_engine(candidates: Sequence[str] = ENGINES) -> Engine:
    """Return the first engine that is installed and answers. Raise Unusable, with the reason for each."""
    reasons = []
    for name in candidates:
        if shutil.which(name) is None:
            reasons.append(f"{name} is not installed")
            continue
        engine = Engine(name)
        try:
            engine.run("info", timeout_s=_INFO_S)
        except EngineError as problem:
            reasons.append(str(problem).splitlines()[-1])
        else:
            return engine
    raise Unusable("; ".join(reasons))


def check_mounts_work(engine: Engine, image: str) -> None:
    """Raise Unusable unless a container of `image` can be run with what a mount needs."""
    if not os.path.exists("/dev/fuse"):
        raise Unusable("/dev/fuse is not there: modprobe fuse")
    try:
        engine.run("run", "--rm", *MAY_MOUNT, "--entrypoint", "sh", image, "-c", ": <>/dev/fuse")
    except EngineError as problem:
        raise Unusable(f"a container cannot be run, or may not use /dev/fuse: {problem}") from None


MAY_MOUNT = ("--device", "/dev/fuse", "--cap-add", "SYS_ADMIN", "--security-opt", "apparmor=unconfined")
"""What a container needs to mount. The profiles for AppArmor that docker and podman bring forbid mount(2)."""
