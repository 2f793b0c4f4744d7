"""Ordinary tools on one mount: the other mount shows the same tree, byte for byte, and so does a local directory."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from trees import assert_same_trees, bytes_for, differences, digest, make_source, run, snapshot

if TYPE_CHECKING:
    from conftest import View


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A local tree with a bit of everything."""
    return make_source(tmp_path / "source")


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A local directory in which the same work is done."""
    path = tmp_path / "local"
    path.mkdir()
    return path


def test_cp(cell: View, source: Path) -> None:
    run("cp", "-a", source, cell.a / "copy")
    assert_same_trees(source, cell.a / "copy")
    assert_same_trees(source, cell.b / "copy")
    run("cp", "-a", cell.b / "copy", cell.b / "again")
    assert_same_trees(source, cell.a / "again")
    run("cp", "-a", cell.a / "again", source.parent / "back")
    assert_same_trees(source, source.parent / "back")
    run("rm", "-r", cell.b / "copy")
    assert os.listdir(cell.a) == ["again"]


def test_tar(cell: View, source: Path) -> None:
    run("tar", "--xattrs", "--sort=name", "-cf", cell.a / "all.tar", "-C", source, ".")
    for view in cell.both:
        (view / "out").mkdir()
        run("tar", "--xattrs", "--xattrs-include=user.*", "-xpf", view / "all.tar", "-C", view / "out")
        assert_same_trees(source, cell.a / "out")
        assert_same_trees(source, cell.b / "out")
        run("tar", "--compare", "-f", view / "all.tar", "-C", view / "out")
        shutil.rmtree(view / "out")
    # Archives of what a mount shows are the same, bit by bit, wherever they are made.
    run("cp", "-a", source, cell.b / "copy")
    archives = []
    for number, tree in enumerate((source, cell.a / "copy", cell.b / "copy")):
        archive = source.parent / f"{number}.tar"
        run("tar", "--sort=name", "-cf", archive, "-C", tree, "--transform=s,^\\.$,top,", ".", "--mtime=@0")
        archives.append(digest(archive))
    assert len(set(archives)) == 1


MIRROR = ("-aHX", "--modify-window=-1")  # compares nanoseconds


def test_rsync(cell: View, source: Path) -> None:
    target = cell.a / "mirror"
    run("rsync", *MIRROR, f"{source}/", f"{target}/")
    assert_same_trees(source, cell.b / "mirror")
    (source / "sub/file4096").write_bytes(bytes_for(99, 5000))
    (source / "many/n007.txt").unlink()
    (source / "new").mkdir()
    (source / "new/one").write_bytes(b"1")
    run("rsync", *MIRROR, "--delete", f"{source}/", f"{cell.b / 'mirror'}/")
    assert_same_trees(source, target)
    for view in cell.both:
        assert run("rsync", *MIRROR, "--delete", "--itemize-changes", f"{source}/", f"{view / 'mirror'}/") == ""
        assert run("rsync", "-ac", "--itemize-changes", "--dry-run", f"{source}/", f"{view / 'mirror'}/") == ""


def test_rsync_in_place_and_append(cell: View, source: Path) -> None:
    big = source / "sub/file1048576"
    big.chmod(0o644)
    run("rsync", "-a", big, cell.a / "big")
    content = bytearray(big.read_bytes())
    content[300_000:300_100] = bytes(100)
    big.write_bytes(content)
    run("rsync", "-a", "--inplace", "--no-whole-file", big, cell.b / "big")
    assert (cell.a / "big").read_bytes() == content
    with big.open("ab") as file:
        file.write(b"more" * 1000)
    run("rsync", "-a", "--append-verify", big, cell.a / "big")
    assert digest(cell.b / "big") == digest(big)


GIT_ENV = {
    "GIT_AUTHOR_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.org",
    "GIT_AUTHOR_DATE": "2020-01-01T00:00:00Z",
    "GIT_COMMITTER_DATE": "2020-01-01T00:00:00Z",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
}


def git(where: Path, *command: str) -> str:
    quiet = ("-c", "gc.auto=0", "-c", "init.defaultBranch=main", "-c", "advice.detachedHead=false")
    return run("git", *quiet, *command, cwd=where, env=GIT_ENV)


def git_work(root: Path) -> list[str]:
    """The same commits wherever it is done; what git says of them."""
    repo = root / "repo"
    repo.mkdir()
    git(repo, "init", "-q")
    for round_ in range(4):
        for i in range(25):
            path = repo / f"d{i % 5}" / f"f{i}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"line {i} of round {round_}\n" * (i * 3 + 1))
        git(repo, "add", "-A")
        git(repo, "commit", "-qm", f"round {round_}")
    git(repo, "mv", "d0/f0.txt", "d1/moved.txt")
    git(repo, "rm", "-q", "d2/f2.txt")
    git(repo, "commit", "-qm", "moved")
    git(repo, "branch", "other", "HEAD~2")
    git(repo, "checkout", "-q", "other")
    (repo / "new").write_text("on other\n")
    git(repo, "add", "new")
    git(repo, "commit", "-qm", "other")
    git(repo, "checkout", "-q", "main")
    git(repo, "merge", "-q", "-m", "merged", "other")
    return [git(repo, "log", "--format=%H %s"), git(repo, "ls-files", "-s"), git(repo, "status", "--porcelain")]


def test_git(cell: View, local: Path) -> None:
    expected = git_work(local)
    assert git_work(cell.a) == expected
    assert expected[2] == ""
    for view in cell.both:
        repo = view / "repo"
        assert git(repo, "status", "--porcelain") == ""
        git(repo, "fsck", "--full", "--strict")
    git(cell.b, "clone", "-q", "--no-hardlinks", "repo", "clone")
    git(cell.a, "clone", "-q", "--local", "repo", "linked")
    git(cell.a / "repo", "gc", "-q", "--prune=now", "--aggressive")
    for name in ("repo", "clone", "linked"):
        for view in cell.both:
            git(view / name, "fsck", "--full", "--strict")
            assert git(view / name, "rev-parse", "HEAD") == git(local / "repo", "rev-parse", "HEAD")
            assert git(view / name, "status", "--porcelain") == ""
    # Work on one mount, seen and continued on the other.
    (cell.b / "clone/d3/f3.txt").write_text("changed through b\n")
    assert git(cell.a / "clone", "status", "--porcelain") == " M d3/f3.txt\n"
    git(cell.a / "clone", "commit", "-qam", "seen")
    assert git(cell.b / "clone", "status", "--porcelain") == ""
    git(cell.b / "clone", "push", "-q", "origin", "HEAD:pushed")
    assert git(cell.a / "repo", "rev-parse", "pushed") == git(cell.b / "clone", "rev-parse", "HEAD")
    assert_same_trees(cell.a, cell.b)


PROJECT = {
    "main.c": '#include <stdio.h>\n#include "sum.h"\nint main(void) { printf("%d\\n", sum(N, 2)); return 0; }\n',
    "sum.c": '#include "sum.h"\nint sum(int a, int b) { return a + b; }\n',
    "sum.h": "#define N 40\nint sum(int a, int b);\n",
    "Makefile": "CFLAGS = -O1 -g\nprog: main.o libsum.a\n\t$(CC) -o $@ $^\nlibsum.a: sum.o\n\tar rcs $@ $^\n"
    "main.o sum.o: sum.h\n.PHONY: clean\nclean:\n\trm -f prog *.o *.a\n",
}


def test_make_and_gcc(cell: View, local: Path) -> None:
    for where in (cell.a, local):
        for name, text in PROJECT.items():
            (where / name).write_text(text)
        run("make", cwd=where)
        assert run(where / "prog") == "42\n"
    assert run(cell.b / "prog") == "42\n"
    assert "up to date" in run("make", cwd=cell.b)
    (cell.b / "sum.h").write_text(PROJECT["sum.h"].replace("40", "50"))
    assert "main.o" in run("make", cwd=cell.a)
    assert run(cell.b / "prog") == "52\n"
    assert "up to date" in run("make", cwd=cell.a)
    run("make", "clean", cwd=cell.b)
    assert sorted(os.listdir(cell.a)) == sorted(PROJECT)
    run("make", "-j4", cwd=cell.b)
    assert run(cell.a / "prog") == "52\n"


def test_mv_find_du(cell: View, source: Path) -> None:
    run("mv", source, cell.a / "moved")  # across file systems: copies, then removes
    assert not source.exists()
    run("mv", cell.b / "moved", cell.b / "renamed")
    run("mv", cell.a / "renamed/many", cell.a / "renamed/sub")
    # Files into a directory, and over an existing one.
    run("mv", "-f", cell.b / "renamed/leaf2", cell.b / "renamed/sub/file511")
    one, other = snapshot(cell.a), snapshot(cell.b)
    differences(one, other, "the mounts")
    assert b"renamed/sub/many/n149.txt" in one
    for options in (
        ["-type", "f", "-size", "+100k"],
        ["-name", "n0*"],
        ["-links", "+1"],
        ["-newermt", "2009-05-01"],
        ["-perm", "/4000"],
        ["-type", "l"],
        ["-empty"],
        ["-printf", "%p %s %T@ %m %n %l\\n"],
    ):
        said = [sorted(run("find", ".", *options, cwd=view).split("\n")) for view in cell.both]
        assert said[0] == said[1]
        assert len(said[0]) > 1, options
    apparent = {run("du", "-sb", "--apparent-size", "--count-links", "sub", cwd=v / "renamed") for v in cell.both}
    assert len(apparent) == 1
    on_disk = {run("du", "-sk", "renamed", cwd=view) for view in cell.both}
    assert len(on_disk) == 1
    assert int(on_disk.pop().split()[0]) >= 4096  # the files hold more than 4 MiB
    run("find", cell.b / "renamed", "-delete")
    assert os.listdir(cell.a) == []


def test_dd(cell: View, local: Path, source: Path) -> None:
    origin = source / "sub/file3145745"
    for where in (cell.a, local):
        copy = where / "copy"
        for options in (
            ["bs=4k"],
            ["bs=1M", "conv=fsync"],
            ["bs=333", "count=1000", "oflag=append", "conv=notrunc"],
            ["bs=1k", "seek=5000", "count=10", "conv=notrunc"],
            ["bs=1k", "skip=100", "count=10", "seek=3", "conv=notrunc,fdatasync"],
            ["bs=64k", "conv=sparse"],
            ["bs=4k", "oflag=sync", "count=20"],
            ["bs=4k", "oflag=direct", "count=20", "seek=2", "conv=notrunc"],
            ["bs=1", "count=0", "seek=100"],
        ):
            run("dd", f"if={origin}", f"of={copy}", *options)
            if where == cell.a:
                assert digest(cell.b / "copy") == digest(cell.a / "copy"), options
    assert digest(cell.b / "copy") == digest(local / "copy")
    assert run("dd", f"if={cell.b / 'copy'}", "bs=17", "iflag=fullblock") == (local / "copy").read_bytes().decode(
        errors="surrogateescape"
    )


def save_like_vi(path: Path, text: str) -> None:
    """Backup by rename, new file under the old name, fsync, backup removed."""
    backup = path.with_name(path.name + "~")
    if path.exists():
        os.rename(path, backup)
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    backup.unlink(missing_ok=True)


def save_atomically(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(new, path)


@pytest.mark.parametrize("save", [save_like_vi, save_atomically])
def test_editors_on_both_mounts_save_in_turn(cell: View, save: Callable[[Path, str], None]) -> None:
    for turn in range(30):
        writer, reader = cell.both if turn % 3 else cell.both[::-1]
        text = f"text of turn {turn}\n" * (turn * 50 % 301 + 1)
        save(writer / "note.txt", text)
        assert (reader / "note.txt").read_text() == text
        assert os.listdir(reader) == ["note.txt"] == os.listdir(writer)
        assert os.stat(reader / "note.txt").st_size == len(text)


def test_sed_and_patch_in_place(cell: View) -> None:
    (cell.a / "text").write_text("one\ntwo\nthree\n")
    run("sed", "-i", "s/two/2/", cell.b / "text")
    assert (cell.a / "text").read_text() == "one\n2\nthree\n"
    run("sed", "-i.orig", "s/one/1/", cell.a / "text")
    assert (cell.b / "text").read_text() == "1\n2\nthree\n"
    assert (cell.b / "text.orig").read_text() == "one\n2\nthree\n"
    run("sort", "-r", "-o", cell.b / "text", cell.b / "text")
    assert (cell.a / "text").read_text() == "three\n2\n1\n"


def test_shutil(cell: View, source: Path) -> None:
    (source / "fifo").unlink()
    shutil.copytree(source, cell.a / "tree", symlinks=True)
    # copytree makes files of their own of hard links.
    here, there = (
        {path: replace(entry, same_as=(), nlink=0) for path, entry in snapshot(tree).items()}
        for tree in (source, cell.b / "tree")
    )
    differences(here, there, "source and copy")
    shutil.move(cell.b / "tree", cell.b / "moved")
    shutil.move(cell.a / "moved/many", cell.a / "many")
    archive = shutil.make_archive(str(cell.a / "archive"), "gztar", cell.a / "many")
    # Python 3.11.4 is the first that knows filters.
    trusting = {"filter": "fully_trusted"} if hasattr(tarfile, "fully_trusted_filter") else {}
    shutil.unpack_archive(cell.b / Path(archive).name, cell.b / "unpacked", **trusting)
    assert_same_trees(cell.a / "unpacked", cell.b / "many", times=False)  # archives keep seconds only
    assert shutil.disk_usage(cell.a).total > 0
    shutil.rmtree(cell.b / "moved")
    shutil.rmtree(cell.a / "many")
    assert sorted(os.listdir(cell.b)) == ["archive.tar.gz", "unpacked"]
