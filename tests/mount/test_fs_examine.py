"""`promisefs fs whereis` and `examine`, on a cell of two servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import MakeCell

pytestmark = pytest.mark.alone
PROMISEFS = Path(sys.executable).with_name("promisefs")
FAILED, USAGE, MOUNTPOINT = 1, 2, 3


def fs(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROMISEFS, "fs", *arguments], capture_output=True, text=True, timeout=60)


def test_where_files_are(make_cell: MakeCell) -> None:
    cell = make_cell(servers=2, mounts=1, server_options=("--lease", "2"), mount_options="timeout=4")
    root = cell.mountpoint("m1")
    cell.create_volume("atlas", 1)
    cell.mount_volume(root / "atlas", "atlas")
    (root / "here").mkdir()
    (root / "here/f").write_bytes(b"on the first")
    (root / "atlas/g").write_bytes(b"on the second")
    first, second = (
        json.loads(fs("examine", "--json", root).stdout),
        json.loads(fs("examine", "--json", root / "atlas").stdout),
    )
    assert (first["name"], first["volume"], first["fid"].split(".")[:2]) == ("root", 1, ["1", "1"])
    assert (second["name"], second["volume"]) == ("atlas", 1 << 16 | 1)
    assert first["server"] != second["server"]
    assert {first["server"], second["server"]} == {f"127.0.0.1:{server.port}" for server in cell.servers}
    size = os.statvfs(cell.store)
    assert first["total_kib"] == size.f_blocks * size.f_frsize // 1024

    inode = os.stat(root / "atlas/g").st_ino
    found = json.loads(fs("examine", "--json", root / "atlas/g").stdout)
    assert found["volume"] << 40 | int(found["fid"].split(".")[1]) == inode
    said = fs("examine", root / "here/f").stdout.splitlines()
    assert said[0].startswith(f"File {root / 'here/f'} (1.")
    assert said[0].endswith("contained in volume 1")
    assert said[1] == "Volume status for vid = 1 named root"
    assert said[2].startswith(f"The volume is on host {first['server']} and has")
    assert "blocks available out of" in said[3]

    done = fs("whereis", root, root / "here/f", root / "atlas", root / "missing", root / "atlas/g")
    assert done.returncode == FAILED
    assert done.stdout.splitlines() == [
        f"File {path} is on host {server['server']}"
        for path, server in [
            (root, first),
            (root / "here/f", first),
            (root / "atlas", second),
            (root / "atlas/g", second),
        ]
    ]
    (complaint,) = done.stderr.splitlines()
    assert "missing" in complaint
    assert "No such file" in complaint

    with (root / "atlas/g").open("rb"), (root / "here/f").open("rb"):
        command = [PROMISEFS, "status", "--mmaps", "--json", root]
        files = json.loads(subprocess.run(command, capture_output=True, timeout=60, check=True).stdout)["files"]
        assert sorted(file["path"] for file in files) == ["/atlas/g", "/here/f"]

    # What is known of the one server needs not the other.
    cell.stop_server(number=1, kill=True)
    assert fs("whereis", root / "here/f").returncode == 0
    away = fs("examine", root / "atlas")
    assert away.returncode == FAILED
    assert len(away.stderr.splitlines()) == 1
    cell.start_server("--lease", "2", number=1)


@pytest.mark.skipif(os.geteuid() != 0, reason="bind mounts are root's")
def test_a_path_in_a_bind_mount(make_cell: MakeCell, tmp_path: Path) -> None:
    cell = make_cell(mounts=1)
    root = cell.mountpoint("m1")
    (root / "a/b").mkdir(parents=True)
    (root / "a/b/f").touch()
    wanted = [json.loads(fs("examine", "--json", path).stdout)["fid"] for path in (root / "a/b/f", root / "a")]
    script = 'mount --bind "$1/a" "$2"; "$0" fs examine --json "$2/b/f"; "$0" fs examine --json "$2"'
    shell = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, PROMISEFS, root, tmp_path]
    said = subprocess.run(shell, capture_output=True, text=True, timeout=60, check=True).stdout
    assert [json.loads(line)["fid"] for line in said.splitlines()] == wanted


def test_what_is_in_no_mount(tmp_path: Path) -> None:
    for command in ("whereis", "examine"):
        done = fs(command, tmp_path)
        assert done.returncode in (FAILED, MOUNTPOINT)
        assert "not in a promisefs mount" in done.stderr
        assert fs(command).returncode == USAGE
        assert "Example" in fs(command, "--help").stdout
