"""docs/install.md: its units, manual pages and completion are what it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from promisefs_client.cli import cli
from promisefs_server.cli import main

ROOT = Path(__file__).parents[2]
COMMANDS = Path(sys.executable).parent
PAGE = (ROOT / "docs" / "install.md").read_text()
GROUPS = {"promisefs": cli, "promisefsd": main}
ENV = {**os.environ, "PATH": f"{COMMANDS}:{os.environ['PATH']}"}


def run(*command: str | Path, **env: str) -> str:
    done = subprocess.run(command, env={**ENV, **env}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def paths(name: str, command: click.Command) -> set[str]:
    inner = command.commands if isinstance(command, click.Group) else {}
    return {name}.union(*(paths(f"{name}-{word}", sub) for word, sub in inner.items() if not sub.hidden))


@pytest.mark.parametrize("program", GROUPS)
def test_there_is_a_manual_page_of_each_command_and_it_says_what_help_says(program: str, tmp_path: Path) -> None:
    pytest.importorskip("click_man")
    run(program, "install-man", "--to", tmp_path / "man1")
    assert {page.stem for page in (tmp_path / "man1").iterdir()} == paths(program, GROUPS[program])
    page = (tmp_path / "man1" / ("promisefs-mount.1" if program == "promisefs" else "promisefsd-serve.1")).read_text()
    for said in ("--config" if program == "promisefs" else "--lease", "Examples:"):
        assert said in page.replace("\\-", "-")
    if shutil.which("man"):
        first = min((tmp_path / "man1").iterdir())
        assert "NAME" in run("man", "-l", first, MANPAGER="cat", MANWIDTH="100", LC_ALL="C.UTF-8")


def completion_line(shell: str) -> str:
    match = re.search(rf"^    (_PROMISEFS_COMPLETE={shell}_source promisefs) \| sudo tee", PAGE, re.MULTILINE)
    assert match
    return match[1]


def test_completion_in_bash() -> None:
    script = f"""
    eval "$({completion_line("bash")})"
    COMP_WORDS=(promisefs um) COMP_CWORD=1
    _promisefs_completion promisefs
    echo "${{COMPREPLY[@]}}"
    COMPREPLY=()
    COMP_WORDS=(promisefs mount --lo) COMP_CWORD=2
    _promisefs_completion promisefs
    echo "${{COMPREPLY[@]}}"
    """
    assert run("bash", "-ec", script) == "umount\n--log-file --log-format\n"


@pytest.mark.skipif(not shutil.which("fish"), reason="there is no fish")
def test_completion_in_fish() -> None:
    script = f"env {completion_line('fish')} | source; complete -C 'promisefs um'; complete -C 'promisefs mount --lo'"
    assert [line.split()[0] for line in run("fish", "-c", script).splitlines()] == [
        "umount",
        "--log-file",
        "--log-format",
    ]


@pytest.mark.skipif(not shutil.which("zsh"), reason="there is no zsh")
def test_completion_in_zsh() -> None:
    """That it is found and loaded; what it offers takes a terminal to see, and comes from where bash's does."""
    script = f'autoload -U compinit; compinit -u -D; eval "$({completion_line("zsh")})"; echo ${{_comps[promisefs]}}'
    assert run("zsh", "-fec", script) == "_promisefs_completion\n"
    offered = run("promisefs", _PROMISEFS_COMPLETE="zsh_complete", COMP_WORDS="promisefs um", COMP_CWORD="1")
    assert offered.splitlines()[:2] == ["plain", "umount"]


@pytest.mark.parametrize("unit", ["promisefsd.service", "promisefs-mount@.service"])
def test_units_are_understood(unit: str, tmp_path: Path) -> None:
    """By systemd where it is; and they start what there is, with options that there are."""
    text = (ROOT / "scripts" / "systemd" / unit).read_text()
    command = re.search(r"^ExecStart=/usr/local/bin/(\S+) (\S+) (.*)$", text, re.MULTILINE)
    assert command and command[2] in GROUPS[command[1]].commands
    helped = run(command[1], command[2], "--help")
    assert all(word in helped for word in command[3].split() if word.startswith("--"))
    assert "Type=notify" in text
    if not shutil.which("systemd-analyze"):
        return
    here = tmp_path / unit
    here.write_text(text.replace("/usr/local/bin", str(COMMANDS)).replace("Documentation=", "#"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", here], capture_output=True, text=True, timeout=60)
    assert not done.stderr.strip(), done.stderr
    if unit == "promisefsd.service":
        rated = run("systemd-analyze", "security", "--offline=true", here)
        level = re.search(r"exposure level for \S+: ([\d.]+)", rated)
        assert level and float(level[1]) < 2


def test_what_the_page_shows_of_configuration_files_is_accepted(tmp_path: Path) -> None:
    shown = re.search(r"^    directory = .*\n(?:    [\w-]+ = .*\n)+", PAGE, re.MULTILINE)
    assert shown
    file = tmp_path / "server.toml"
    file.write_text("\n".join(line.strip() for line in shown[0].splitlines()) + "\n")
    printed = tomllib.loads(run("promisefsd", "serve", "--config", file, "--print-config"))
    assert printed["directory"] == "/var/lib/promisefs/store" and printed["lease"] == 15
    assert printed["tls-cert"] == "/etc/promisefs/tls/server.pem"
