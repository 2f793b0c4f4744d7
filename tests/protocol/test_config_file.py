"""Configuration files: the same names as options, the command line before them, mistakes with their line."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from promisefs_protocol.config_file import Configured


class Listing(Configured):
    option_list = "listed"

    def fault_of(self, item: str) -> str:
        return "" if item.partition("=")[0] in ("cache", "ro") else super().fault_of(item)


@click.command(cls=Listing)
@click.argument("place")
@click.option("-o", "listed", multiple=True)
@click.option("--lease", type=click.FloatRange(1, 10), default=5.0)
@click.option("--log-file")
@click.option("--verbose", "-v", is_flag=True)
@click.option("--secret", hidden=True)
def command(
    place: str, listed: tuple[str, ...], lease: float, log_file: str | None, verbose: bool, secret: str | None
) -> None:
    click.echo(f"{place} {','.join(listed)} {lease} {log_file} {verbose}")


def run(tmp_path: Path, text: str, *arguments: str) -> Result:
    file = tmp_path / "c.toml"
    file.write_text(text)
    return CliRunner().invoke(command, ["--config", str(file), *arguments])


def test_what_the_file_says_is_in_force(tmp_path: Path) -> None:
    done = run(tmp_path, 'place = "/a"\nlease = 2\nlog-file = "x"\nverbose = true\ncache = "1G"\nro = true\n')
    assert done.output == "/a cache=1G,ro 2.0 x True\n"


def test_the_command_line_counts_before_it_and_it_before_defaults(tmp_path: Path) -> None:
    text = 'place = "/a"\nlease = 2\ncache = "1G"\n'
    assert run(tmp_path, text, "/b", "--lease", "3", "-o", "cache=2G").output == "/b cache=1G,cache=2G 3.0 None False\n"
    assert run(tmp_path, "", "/b").output == "/b  5.0 None False\n"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("# first\n\nleese = 2\n", "line 3: no option is called 'leese'"),
        ('place = "/a"\nlog_file = "x"\n', "line 2: no option is called 'log_file'"),
        ('secret = "x"\n', "line 1: no option is called 'secret'"),
        ('print-config = "x"\n', "no option is called 'print-config'"),
        ("lease = 2\n\n[cache]\nsize = 3\n", "line 3: cache is no text"),
        ("lease = [1]\n", "line 1: lease is no text"),
        ("lease = \n", "c.toml: Invalid value (at line 1, column 9)"),
        ("lease = 20\n", "20.0 is not in the range 1<=x<=10"),
        ("place = 1\nverbose = 'perhaps'\n", "not a valid boolean"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, text: str, what: str) -> None:
    done = run(tmp_path, text, "/b")
    assert done.exit_code == 2 and what in done.output.replace("\n", " ")


def test_a_file_that_cannot_be_read() -> None:
    done = CliRunner().invoke(command, ["--config", "/nonexistent.toml", "/b"])
    assert done.exit_code == 2 and "cannot read /nonexistent.toml: No such file" in done.output


def test_what_is_printed_is_a_file_that_says_the_same(tmp_path: Path) -> None:
    text = 'place = "/\\"a\\" \\u00e4"\nlease = 2\ncache = "1G"\nro = true\n'
    printed = run(tmp_path, text, "--log-file", "x", "--print-config").output
    assert 'log-file = "x"  # from the command line' in printed and "lease = 2.0  # from the file" in printed
    assert "verbose = false  # the default" in printed
    assert (
        run(tmp_path, printed).output
        == run(tmp_path, text, "--log-file", "x").output
        == '/"a" ä cache=1G,ro 2.0 x False\n'
    )
