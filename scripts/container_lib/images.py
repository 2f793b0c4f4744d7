"""The images: a base that can be had, and what containers/Containerfile makes of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .engine import Engine, EngineError, Unusable

ROOT = Path(__file__).resolve().parents[2]
CONTAINERFILE = ROOT / "containers/Containerfile"
_PULL_S = 300.0
_BUILD_S = 1800.0
_DEBIAN = re.compile(r"(?:docker\.io/)?(?:library/)?debian:([a-z]+)(?:-slim)?")


def find_base(engine: Engine, image: str) -> str:
    """Return the name of an image to build on: `image` itself, or one like it made with debootstrap.

    Raise Unusable if there is neither.
    """
    if engine.succeeds("image", "inspect", image):
        return image
    print(f"ci-container: pulling {image}", flush=True)
    try:
        engine.run("pull", image, timeout_s=_PULL_S)
        return image
    except EngineError as problem:
        said = str(problem).splitlines()[-1]
    debian = _DEBIAN.fullmatch(image)
    if debian is None or shutil.which("debootstrap") is None or os.geteuid() != 0:
        raise Unusable(f"there is no {image}: {said}; as root, with debootstrap installed, a Debian base can be made")
    own = f"localhost/promisefs-debian:{debian[1]}"
    if not engine.succeeds("image", "inspect", own):
        print(f"ci-container: no registry answers, making {own} with debootstrap", flush=True)
        _bootstrap(engine, debian[1], own)
    return own


def _bootstrap(engine: Engine, release: str, image: str) -> None:
    with tempfile.TemporaryDirectory(prefix="promisefs-debootstrap-") as directory:
        made = subprocess.run(
            ["debootstrap", "--variant=minbase", release, directory],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_BUILD_S,
        )
        if made.returncode:
            raise Unusable(f"debootstrap {release} failed: {made.stdout.strip().splitlines()[-1:]}")
        tar = subprocess.Popen(
            ["tar", "-C", directory, "--exclude=./var/cache/apt/*", "-c", "."], stdout=subprocess.PIPE
        )
        assert tar.stdout is not None
        with tar.stdout:
            engine.run("import", "-", image, timeout_s=_BUILD_S, stdin=tar.stdout)
        if tar.wait():
            raise Unusable(f"tar of {directory} failed")


def build(engine: Engine, target: str, base: str, tag: str) -> str:
    """Build one target of the Containerfile; return the image's name. Raise EngineError."""
    image = f"localhost/promisefs-{target}:{tag}"
    arguments = ["build", "-f", str(CONTAINERFILE), "--target", target, "-t", image, "--build-arg", f"BASE={base}"]
    if index := os.environ.get("PIP_INDEX_URL"):
        arguments += ["--build-arg", f"PIP_INDEX_URL={index}"]
    if bundle := os.environ.get("PIP_CERT"):
        arguments += ["--secret", f"id=ca,src={bundle}"]
    print(f"ci-container: building {image}", flush=True)
    if status := engine.show(*arguments, str(ROOT), timeout_s=_BUILD_S):
        raise EngineError(f"{engine.name} build --target {target} ended with status {status}")
    return image


@contextmanager
def mmap_program(engine: Engine, test_image: str, container: str) -> Iterator[Path]:
    """scripts/mmap_demo.c, compiled in the test image: containers of the same base can run it."""
    with tempfile.TemporaryDirectory(prefix="promisefs-ci-") as directory:
        program = Path(directory) / "mmap_demo"
        compile_it = ("-O2", "-o", "/mmap_demo", "scripts/mmap_demo.c")
        engine.run("run", "--name", container, "--entrypoint", "cc", test_image, *compile_it)
        engine.run("cp", f"{container}:/mmap_demo", program)
        engine.run("rm", container)
        yield program
