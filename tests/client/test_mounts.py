"""Reading mountinfo."""

from __future__ import annotations

from pathlib import Path

import pytest
from promisefs_client.commands import mounts
from promisefs_client.errors import UserError

MOUNTINFO = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 22 0:51 / /mnt/a\\040b\\134c rw,nosuid,nodev - fuse.promisefs files:7654/root rw,user_id=1000,group_id=0
41 22 0:52 / /mnt/two rw,nosuid master:2 propagate_from:1 - fuse.promisefs h:1/v\\0431 rw,user_id=0,group_id=0
39 41 0:53 / /mnt/two rw,nosuid - fuse.promisefs h:1/w rw,user_id=7,group_id=0,default_permissions
43 22 0:54 / /mnt/three rw - fuse.promisefs h:1/w rw,user_id=7
44 43 0:55 / /mnt/three rw - tmpfs none rw
45 22 0:51 /dir /mnt/bound rw,nosuid,nodev - fuse.promisefs files:7654/root rw,user_id=1000,group_id=0
46 22 0:56 / /mnt/other rw - fuse.sshfs host: rw,user_id=1000
"""


@pytest.fixture(autouse=True)
def mountinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mountinfo"
    file.write_text(MOUNTINFO)
    real_open = open
    monkeypatch.setattr(mounts, "open", lambda path, **how: real_open(file, **how), raising=False)


def test_every_mount_of_ours() -> None:
    found = [(e.device, e.mountpoint, e.source, e.owner) for e in mounts.list_mounts()]
    assert found == [
        ("0:51", "/mnt/a b\\c", "files:7654/root", 1000),
        ("0:52", "/mnt/two", "h:1/v#1", 0),
        ("0:53", "/mnt/two", "h:1/w", 7),
        ("0:54", "/mnt/three", "h:1/w", 7),
        ("0:51", "/mnt/bound", "files:7654/root", 1000),
    ]


def test_which_directory_is_mounted() -> None:
    assert mounts.find_mount("/mnt/bound").root == "/dir"
    assert mounts.find_mount("/mnt/two").root == "/"


def test_the_uppermost_counts_not_the_last() -> None:
    assert mounts.find_mount("/mnt/two").device == "0:53"
    assert mounts.find_mount("/mnt/a b\\c").owner == 1000


@pytest.mark.parametrize("path", ["/mnt/three", "/mnt/other", "/mnt", "/mnt/two/below"])
def test_what_is_no_mount_of_ours_or_covered(path: str) -> None:
    with pytest.raises(UserError, match="not a promisefs mount"):
        mounts.find_mount(path)
