"""`scripts/ci-container`: the integration tests in a container, and the mmap reader and writer between containers."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from types import FrameType

from container_lib import checks, images
from container_lib.cell import LABEL, CellError, ContainerCell, Images
from container_lib.checks import CheckFailed
from container_lib.engine import ENGINES, MAY_MOUNT, Engine, EngineError, Unusable, check_mounts_work, find_engine

SKIPPED = 77
"""The exit status that automake and meson use for a test that cannot run here."""
BASE = "docker.io/library/debian:bookworm-slim"
TESTS = ("tests/mount", "-m", "not alone", "-n", "2", "--dist", "worksteal")
_TESTS_S = 3600.0

_DESCRIPTION = """\
Build the images of containers/Containerfile with podman or docker, run the integration tests in a container, and
check promisefs between containers: a server and two or three clients, each with its own mounts and network.

Exit status: 0 all passed; 1 a test failed or an image could not be built; 2 usage; 77 skipped: no container engine can
run here, or there is no base image (the reason is printed).
"""

_EPILOG = """\
Without a registry a Debian base image is made with debootstrap if that is installed (as root). PIP_CERT and
PIP_INDEX_URL in the environment count for the builds, too. Everything that runs is removed in the end; the images stay.

Examples:
  scripts/ci-container
  scripts/ci-container --base docker.io/library/debian:trixie-slim
  scripts/ci-container --only between
  scripts/ci-container --only tests tests/mount/test_mmap.py tests/mount/test_network.py
"""


def run_tests(engine: Engine, base: str, tag: str, arguments: list[str]) -> bool:
    """Run pytest in the test image. A volume at /tmp: what lies below real mounts is no overlay file system there."""
    image = images.build(engine, "test", base, tag)
    name = f"{LABEL}-{os.urandom(4).hex()}-test"
    rights = (*MAY_MOUNT, "--cap-add", "NET_ADMIN", "--cap-add", "DAC_READ_SEARCH")
    where = ("--name", name, "--init", "--volume", "/tmp")
    print(f"== tests in a container: {' '.join(arguments)}", flush=True)
    try:
        status = engine.show("run", "--rm", *where, *rights, image, *arguments, timeout_s=_TESTS_S)
    finally:
        if engine.succeeds("inspect", name):
            engine.run("rm", "--force", "--volumes", name)
    return status == 0


def run_checks(engine: Engine, base: str, tag: str) -> tuple[int, int]:
    """Run what is checked between containers; return how many checks passed and failed."""
    server, client, test = (images.build(engine, target, base, tag) for target in ("server", "client", "test"))
    passed = failed = 0
    with images.mmap_program(engine, test, f"{LABEL}-{os.urandom(4).hex()}-cc") as program:
        for check in checks.CHECKS:
            began = time.monotonic()
            try:
                with ContainerCell(engine, Images(server, client, program)) as cell:
                    check(cell)
            except (CheckFailed, CellError, EngineError) as problem:
                failed += 1
                print(f"== {check.__name__}: FAILED: {problem}", flush=True)
            else:
                passed += 1
                print(f"== {check.__name__}: ok ({time.monotonic() - began:.1f} s)", flush=True)
    print(f"== between containers: {passed} passed, {failed} failed", flush=True)
    return passed, failed


def run(engine_name: str | None, base: str, only: str | None, test_arguments: list[str]) -> int:
    engine = find_engine([engine_name] if engine_name else ENGINES)
    base = images.find_base(engine, base)
    check_mounts_work(engine, base)
    tag = re.sub(r"[^a-zA-Z0-9_.]+", "-", base.rsplit("/", 1)[-1])
    good = True
    if only != "between":
        good &= run_tests(engine, base, tag, test_arguments or list(TESTS))
    if only != "tests":
        good &= run_checks(engine, base, tag)[1] == 0
    print(f"== {engine.name}, {base}: {'all passed' if good else 'FAILED'}", flush=True)
    return 0 if good else 1


def _interrupt(_signal_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/ci-container",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", choices=ENGINES, help="which; without it the first of them that answers")
    parser.add_argument("--base", metavar="IMAGE", default=BASE, help=f"Debian to build on (default: {BASE})")
    parser.add_argument("--only", choices=("tests", "between"), help="one of the two parts")
    parser.add_argument(
        "pytest", nargs=argparse.REMAINDER, metavar="PYTEST-ARGUMENT", help=f"(default: {' '.join(TESTS)})"
    )
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return run(given.engine, given.base, given.only, given.pytest)
    except Unusable as reason:
        print(f"ci-container: skipped: {reason}", file=sys.stderr)
        return SKIPPED
    except EngineError as problem:
        print(f"ci-container: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ci-container: interrupted", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
