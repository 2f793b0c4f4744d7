"""mount(8), umount(8) and fstab with the type promisefs, in a mount namespace with an /sbin of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import MakeCell

pytestmark = pytest.mark.alone
COMMANDS = Path(sys.executable).parent

OWN_SBIN = """
set -e
sbin=$(realpath /sbin)
mkdir $dir/was $dir/sbin $dir/m
mount --bind $sbin $dir/was
for program in $dir/was/*; do ln -s $program $dir/sbin/; done
rm -f $dir/sbin/*promisefs
mount --bind $dir/sbin $sbin
trap 'mountpoint -q $dir/m && $commands/promisefs umount --force $dir/m' EXIT
$commands/promisefs install-helpers
status() { "$@" 2>&1 && echo "status 0" || echo "status $?"; }
"""


def run(make_cell: MakeCell, script: str) -> tuple[str, Path]:
    """Run a shell script with $source and $dir set. Return what it says, and a view of the cell."""
    if os.getuid() != 0:
        pytest.skip("mount(8) mounts for root only")
    cell = make_cell(mounts=1)
    directory = cell.directory / "helper"
    directory.mkdir()
    settings = {"dir": str(directory), "commands": str(COMMANDS), "source": f"{cell.address}/root"}
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", OWN_SBIN + script],
        env={**os.environ, **settings}, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout, cell.mountpoint("m1")


def test_fstab(make_cell: MakeCell) -> None:
    said, view = run(
        make_cell,
        """
        echo "$source $dir/m promisefs _netdev,nofail,noatime,cache=64M,x-systemd.automount 0 0" > $dir/fstab
        mount -a -T $dir/fstab
        findmnt -n -o FSTYPE,SOURCE $dir/m
        echo written > $dir/m/file
        mount -a -T $dir/fstab; echo "again $?"
        findmnt -n $dir/m | wc -l
        umount $dir/m; echo "umount $?"
        mount -T $dir/fstab $dir/m
        cat $dir/m/file
        umount $dir/m
        """,
    )
    lines = said.splitlines()
    assert lines[3].startswith("fuse.promisefs 127.0.0.1:"), "made by helpers that were installed first"
    assert lines[4:] == ["again 0", "1", "umount 0", "written"]
    assert (view / "file").read_text() == "written\n", "umount(8) returned when all was stored"


def test_what_cannot_be_done_is_said_in_one_line(make_cell: MakeCell) -> None:
    said, _ = run(
        make_cell,
        """
        status mount -t promisefs $source $dir/m -o cash=64M
        status mount -t promisefs nowhere.invalid:/root $dir/m
        status mount -t promisefs $source $dir/missing
        mount -t promisefs $source $dir/m
        status mount -o remount,ro $dir/m
        touch $dir/m/file
        status mount -t promisefs $source $dir/m
        umount $dir/m
        """,
    )
    lines = [line for line in said.splitlines()[3:] if line]
    statuses = [line for line in lines if line.startswith("status")]
    assert statuses == ["status 1", "status 32", "status 32", "status 1", "status 32"]
    assert "mount.promisefs: option 'cash=64M' is not known; see 'promisefs mount --help'" in lines
    assert "mount.promisefs: remount is not supported: unmount it and mount it again" in said
    assert any("nowhere.invalid" in line for line in lines)
    assert "Traceback" not in said


def test_options_in_a_file(make_cell: MakeCell) -> None:
    said, _ = run(
        make_cell,
        """
        printf 'cache = "64M"\\nro = true\\n' > $dir/client.toml
        mount -t promisefs $source $dir/m -o config=$dir/client.toml
        status touch $dir/m/file
        umount $dir/m
        echo 'cash = "64M"' >> $dir/client.toml
        status mount -t promisefs $source $dir/m -o config=$dir/client.toml
        """,
    )
    assert "Read-only file system" in said
    assert said.count("line 3: option 'cash=64M' is not known") == 1 and said.endswith("status 1\n")
