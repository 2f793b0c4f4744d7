"""Compiles fuse_extension.c. By hand: python -m promisefs_client.fuse.fuse_extension_build

The build hook of the package (scripts/hatch_build.py) runs this file alone, before anything is installed: standard
library only. It takes a C compiler, pkg-config and the headers of libfuse 3, which pyfuse3 needs too.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("fuse_extension.c")
BUILT = SOURCE.with_name("libfuse_extension.so")  # not fuse_extension.so, which Python would import
_FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O2", "-g", "-Wall", "-Wextra", "-fPIC", "-shared", "-fvisibility=hidden")


class CannotBuild(Exception):
    """One line for people: what is missing, or what the compiler said."""


def fingerprint() -> str:
    """Of the C source. What was built from another one is not used."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]


def is_current() -> bool:
    """Whether it has been built, from this source."""
    try:
        return fingerprint().encode() in BUILT.read_bytes()
    except FileNotFoundError:
        return False


def build(target: Path = BUILT, extra_flags: tuple[str, ...] = ()) -> None:
    """Compile into `target`, which is replaced in one step. Raise CannotBuild."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    libfuse = _run(["pkg-config", "--cflags", "--libs", "fuse3"]).split()
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    stamp = f'-DFINGERPRINT="{fingerprint()}"'
    try:
        _run([*compiler, *_FLAGS, *extra_flags, stamp, str(SOURCE), "-o", str(unfinished), *libfuse])
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except OSError as error:
        raise CannotBuild(f"{command[0]}: {error.strerror}") from None
    except subprocess.CalledProcessError as error:
        raise CannotBuild(f"{command[0]} failed: {error.stderr.strip() or error.returncode}") from None


def main() -> None:
    try:
        build(extra_flags=tuple(sys.argv[1:]))
    except CannotBuild as error:
        sys.exit(str(error))
    print(BUILT)


if __name__ == "__main__":
    main()
