"""What mount(8) and umount(8) call for the type promisefs, and how they find it.

mount(8) looks for /sbin/mount.TYPE. A mount made by it is of the type fuse.promisefs, so what it looks for to remount
is /sbin/mount.fuse.promisefs, and umount(8) looks for /sbin/umount.fuse.promisefs. `promisefs install-helpers` makes
these as links to the programs of this installation.
The helpers' arguments and exit codes are those of mount(8), "EXTERNAL HELPERS" and "EXIT STATUS".
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import click

from promisefs_client.errors import ExitCode, UserError

HELPERS = {
    "mount.promisefs": "mount.promisefs",
    "mount.fuse.promisefs": "mount.promisefs",
    "umount.fuse.promisefs": "umount.promisefs",
}
"""Links, and the programs that they lead to."""
WRONG_USAGE, FAILED = 1, 32
_NOT_PASSED_ON = {"remount": "unmount it and mount it again with the options that it is to have"}

_settings = {"help_option_names": ["-h", "--help"]}


@click.command(context_settings=_settings)
@click.argument("source")
@click.argument("mountpoint", type=click.STRING)
@click.option(
    "-o", "options", multiple=True, metavar="OPT[,OPT...]", help="As for 'promisefs mount'; also config=FILE."
)
@click.option("-f", "fake", is_flag=True, help="Check the options, and do nothing.")
@click.option("-s", "sloppy", is_flag=True, help="Ignored: options that are not known are refused.")
@click.option("-n", "no_mtab", is_flag=True, help="Ignored: there is no mtab.")
@click.option("-v", "verbose", is_flag=True, help="Say what is done.")
@click.option("-N", "namespace", metavar="NS", help="Refused.")
@click.option("-t", "kind", metavar="TYPE", help="Ignored.")
def _mount(
    source: str, mountpoint: str, options: tuple[str, ...], fake: bool, sloppy: bool, no_mtab: bool, verbose: bool,
    namespace: str | None, kind: str | None,
) -> None:  # fmt: skip
    """Mount SOURCE, HOST:/VOLUME or HOST:PORT/VOLUME, for mount(8) and /etc/fstab.

    \b
    Line in /etc/fstab:
      files.example.org:/root /mnt/files promisefs _netdev,nofail,cache=1G 0 0
    """
    from promisefs_client import cli
    from promisefs_client.options import parse_options, parse_source

    if namespace is not None:
        raise UserError("-N is not supported: enter the namespace with nsenter(1)", ExitCode.USAGE)
    config, passed = _sorted_out(options)
    how = parse_options(tuple(passed))
    if "," not in source:
        # So that mount -a sees that a line of fstab is mounted already.
        passed.append(f"fsname={source}")
    if config is None:
        parse_source(source, how.cell_file)
    arguments = ["mount", source, mountpoint, *(f"-o{option}" for option in passed)]
    if config is not None:
        arguments += ["--config", config]
    if fake:
        return
    if verbose:
        click.echo(f"promisefs {' '.join(arguments)}")
    cli.cli(arguments, prog_name="promisefs", standalone_mode=False)


def _sorted_out(options: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the configuration file that they name, and those that are for the mount."""
    config, passed = None, []
    for option in (option for text in options for option in text.split(",") if option):
        name, _, value = option.partition("=")
        if name in _NOT_PASSED_ON:
            raise UserError(f"{name} is not supported: {_NOT_PASSED_ON[name]}", ExitCode.USAGE)
        if name == "config":
            config = value
        else:
            passed.append(option)
    return config, passed


@click.command(context_settings=_settings)
@click.argument("mountpoint", type=click.STRING)
@click.option("-f", "force", is_flag=True, help="Even if data is not stored, or the mount is in use.")
@click.option("-l", "lazy", is_flag=True, help="The same.")
@click.option("-n", "no_mtab", is_flag=True, help="Ignored: there is no mtab.")
@click.option("-r", "read_only", is_flag=True, help="Ignored.")
@click.option("-v", "verbose", is_flag=True, help="Ignored.")
@click.option("-N", "namespace", metavar="NS", help="Refused.")
@click.option("-t", "kind", metavar="TYPE", help="Ignored.")
def _umount(
    mountpoint: str, force: bool, lazy: bool, no_mtab: bool, read_only: bool, verbose: bool, namespace: str | None,
    kind: str | None,
) -> None:  # fmt: skip
    """Unmount MOUNTPOINT for umount(8): as 'promisefs umount', so nothing is lost that was written."""
    from promisefs_client import cli

    if namespace is not None:
        raise UserError("-N is not supported: enter the namespace with nsenter(1)", ExitCode.USAGE)
    arguments = ["umount", mountpoint, *(["--force"] if force or lazy else [])]
    cli.cli(arguments, prog_name="promisefs", standalone_mode=False)


def mount() -> None:
    """Entry point of mount.promisefs."""
    _run(_mount, "mount.promisefs")


def umount() -> None:
    """Entry point of umount.promisefs."""
    _run(_umount, "umount.promisefs")


def _run(command: click.Command, name: str) -> None:
    try:
        command(prog_name=name, standalone_mode=False)
    except UserError as error:
        click.echo(f"{name}: {error}", err=True)
        sys.exit(WRONG_USAGE if error.code == ExitCode.USAGE else FAILED)
    except click.ClickException as error:
        click.echo(f"{name}: {error.format_message()}", err=True)
        sys.exit(WRONG_USAGE)
    except click.Abort:
        sys.exit(FAILED)


@click.command(
    "install-helpers",
    epilog="\b\nExamples:\n  sudo promisefs install-helpers\n  promisefs install-helpers --to /tmp/sbin --remove",
)
@click.option(
    "--to", "folder", type=click.Path(file_okay=False, path_type=Path), default=Path("/sbin"), show_default=True,
    metavar="DIR", help="Where mount(8) looks.",
)  # fmt: skip
@click.option("--remove", is_flag=True, help="Remove them again.")
def install_helpers(folder: Path, remove: bool) -> None:
    """Have mount(8) and /etc/fstab know the type promisefs, by links to this installation. As root."""
    scripts = Path(sysconfig.get_path("scripts"))
    for link, program in HELPERS.items():
        target, path = scripts / program, folder / link
        if not remove and not target.is_file():
            raise UserError(f"{target} is missing: install promisefs again")
        if path.exists() and not path.is_symlink():
            raise UserError(f"{path} is no link, so it is somebody else's: nothing is done with it")
        try:
            path.unlink(missing_ok=True)
            if not remove:
                path.symlink_to(target)
                click.echo(f"{path} -> {target}")
        except OSError as error:
            hint = "" if os.access(folder, os.W_OK) else ": run it as root"
            raise UserError(f"{path}: {error.strerror}{hint}") from None
