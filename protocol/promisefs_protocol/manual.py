"""Manual pages of a command and its subcommands, made from what --help says, so that they say the same."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

import click

DEFAULT_FOLDER = Path("/usr/local/share/man/man1")


def install_man(program: str, group: click.Group) -> click.Command:
    """Make the command `install-man` of a program."""

    @click.command("install-man", epilog=f"\b\nExamples:\n  sudo {program} install-man\n  man {program}")
    @click.option(
        "--to", "folder", type=click.Path(file_okay=False, path_type=Path), default=DEFAULT_FOLDER, show_default=True,
        metavar="DIR", help="Folder for pages of section 1; it is made.",
    )  # fmt: skip
    def command(folder: Path) -> None:
        """Write the manual pages of this program and its commands."""
        try:
            count = write_manual(program, group, folder)
        except OSError as error:
            raise click.ClickException(f"cannot write to {folder}: {error.strerror}") from None
        click.echo(f"{count} pages in {folder}")

    return command


def write_manual(program: str, group: click.Group, folder: Path) -> int:
    """Write a page for each command. Return how many. Raise OSError: then none is half written."""
    from click_man.core import write_man_pages  # here, so that no other command has to load it

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        write_man_pages(program, group, version=version("promisefs"), target_dir=temporary)
        pages = list(Path(temporary).iterdir())
        for page in pages:
            _add_epilog(page, _command_of(page.stem, program, group))
            page.rename(folder / page.name)
    return len(pages)


def _command_of(stem: str, program: str, group: click.Group) -> click.Command:
    """The command of a page: the one whose words, joined with "-", are its name."""
    rest, command = stem.removeprefix(program).removeprefix("-"), group
    found: click.Command = command
    while rest:
        assert isinstance(found, click.Group)
        name = max((name for name in found.commands if rest == name or rest.startswith(name + "-")), key=len)
        found, rest = found.commands[name], rest[len(name) + 1 :]
    return found


def _add_epilog(page: Path, command: click.Command) -> None:
    """Examples and exit codes, which click-man leaves out."""
    lines = (command.epilog or "").replace("\b\n", "").replace("\\", "\\\\").splitlines()
    if not lines:
        return
    escaped = [f"\\&{line}" if line.startswith((".", "'")) else line for line in lines]
    with open(page, "a", encoding="utf-8") as text:
        text.write("\n.SH NOTES\n.nf\n" + "\n".join(escaped) + "\n.fi\n")
