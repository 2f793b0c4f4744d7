"""The command `promisefs`: mount, umount, status."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import click
import trio
from promisefs_protocol import collector, service_manager
from promisefs_protocol.config_file import Configured
from promisefs_protocol.manual import install_man
from promisefs_protocol.observe import logs
from promisefs_protocol.observe.logs import LogFormat

from .commands.fs import fs
from .commands.login import login, logout, tokens
from .commands.mmaps_view import fetch_mmaps, mmaps_table
from .commands.mount_helper import install_helpers
from .commands.mounts import MountEntry, find_mount, list_mounts
from .commands.pts import pts
from .commands.rejects import rejects
from .commands.status_view import console, error_line, fetch_status, mount_table, overview, place_of, printable
from .commands.top import top
from .commands.trace import trace
from .commands.unmounting import unmount as unmount_entry
from .errors import ExitCode, UserError
from .options import parse_options, parse_source, with_absolute_paths

READY = b"ready\n"

_UNTOUCHED = click.STRING
"""A path of a mount: click.Path would stat it, and that may hang."""

_EXIT_CODES = (
    """Exit codes: 0 done; 1 failed; 2 wrong usage; 3 mountpoint; 4 server; 5 FUSE; 6 busy or data not stored."""
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EXIT_CODES)
@click.version_option(package_name="promisefs")
def cli() -> None:
    """Mount promisefs volumes."""


class _Mount(Configured):
    option_list = "options"
    not_in_files = (*Configured.not_in_files, "foreground")

    def fault_of(self, item: str) -> str:
        try:
            parse_options((item.removesuffix("=False"),))
        except UserError as error:
            return str(error)
        return ""


@cli.command(
    cls=_Mount,
    epilog="\b\nExamples:\n"
    "  promisefs mount localhost /mnt/home\n"
    "  promisefs mount -o cache=1G,timeout=20 files:7654/root /mnt\n"
    "  promisefs mount -o cell=/etc/promisefs/example.toml example.org /mnt\n"
    "  promisefs mount --config /etc/promisefs/client.toml localhost /mnt",
)
@click.argument("source", metavar="SOURCE")
@click.argument("mountpoint", type=click.Path(readable=False))
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground; log to the terminal.")
@click.option(
    "-o",
    "options",
    multiple=True,
    metavar="OPT[,OPT...]",
    help="tls, ca=FILE, cell=FILE, cache=SIZE (256M), timeout=SECONDS (60) to wait for the server, "
    "ack_wait=SECONDS (1), locks=cell|local|off, key_wait=SECONDS (300), rejects=DIR, rejects_size=SIZE (1G), "
    "rejects_age=DAYS (30), metrics=HOST:PORT, allow_other, ro, and the generic options of mount(8).",
)
@click.option("--log-file", type=click.Path(dir_okay=False), help="Append the log here.")
@click.option(
    "--log-format",
    type=click.Choice([form.value for form in LogFormat]),
    default=LogFormat.TEXT.value,
    show_default=True,
    help="Text for people, or one JSON object a line.",
)
@click.option("-v", "--verbose", is_flag=True, help="Log every event: breaks, promises, calls...")
@click.option("--ready-fd", type=int, default=-1, hidden=True)
def mount(
    source: str,
    mountpoint: str,
    foreground: bool,
    options: tuple[str, ...],
    log_file: str | None,
    log_format: str,
    verbose: bool,
    ready_fd: int,
) -> None:
    """Mount a volume on an empty directory.

    SOURCE is HOST[:PORT][/VOLUME], or CELL[/VOLUME] with -o cell=FILE, the cell file that its servers have as well. The
    port is 7654 and the volume root unless told otherwise.

    Returns when the mount is usable; a process goes on in the background until it is unmounted.
    """
    from .fuse import fuse_extension

    fuse_extension.load()
    from . import mount as mounting

    how = parse_options(options)
    where = parse_source(source, how.cell_file)
    place = mounting.check_mountpoint(mountpoint)
    mounting.check_fuse()
    if not foreground:
        _mount_in_background(source, place, options, log_file, log_format, verbose)
        return
    _set_up_log(log_file, LogFormat(log_format), verbose, to_terminal=ready_fd < 0)

    def on_ready() -> None:
        if ready_fd >= 0:
            _leave_terminal(log_file)
            os.write(ready_fd, READY)
            os.close(ready_fd)
        else:
            service_manager.notify(service_manager.READY)

    collector.set_for_daemon()
    trio.run(mounting.Mount(where, place, how).run, on_ready)


def _mount_in_background(
    source: str, mountpoint: str, options: tuple[str, ...], log_file: str | None, log_format: str, verbose: bool
) -> None:
    """Start ourselves again, in a session of its own, and wait for its word."""
    read_fd, write_fd = os.pipe()
    command = [
        sys.executable,
        "-m",
        "promisefs_client.cli",
        "mount",
        source,
        mountpoint,
        "-f",
        f"--ready-fd={write_fd}",
        f"--log-format={log_format}",
    ]
    for option in with_absolute_paths(options):
        command += ["-o", option]
    if log_file is not None:
        command += ["--log-file", os.path.abspath(log_file)]
    if verbose:
        command.append("-v")
    process = subprocess.Popen(
        command,
        pass_fds=[write_fd],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd="/",
    )
    os.close(write_fd)
    with open(read_fd, "rb") as pipe:
        word = pipe.read(len(READY))
    if word == READY:
        assert process.stderr is not None
        process.stderr.close()
        process.returncode = 0  # it lives on, without us
        return
    _, errors = process.communicate()
    lines = errors.decode(errors="replace").strip().splitlines()
    message = lines[-1].removeprefix("promisefs: ") if lines else "the mount process ended without a word"
    known = {code.value for code in ExitCode}
    code = ExitCode(process.returncode) if process.returncode in known else ExitCode.FAILURE
    raise UserError(message, code if code is not ExitCode.OK else ExitCode.FAILURE)


def _leave_terminal(log_file: str | None) -> None:
    """Nobody reads our output from now on: what Python may say in its last moments goes to the log."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    descriptor = os.open(os.devnull if log_file is None else log_file, flags, 0o666)
    for output in (sys.stdout, sys.stderr):
        os.dup2(descriptor, output.fileno())
    os.close(descriptor)


def _set_up_log(log_file: str | None, log_format: LogFormat, verbose: bool, to_terminal: bool) -> None:
    handler: logging.Handler
    try:
        if log_file is not None:
            handler = logging.FileHandler(log_file)
        elif to_terminal:
            handler = logging.StreamHandler()
        elif os.path.exists("/dev/log"):
            handler = logging.handlers.SysLogHandler("/dev/log")
        else:
            handler = logging.NullHandler()
    except OSError as error:
        raise UserError(f"{log_file or '/dev/log'}: {error.strerror}") from None
    logs.set_up(handler, log_format, "%(asctime)s %(levelname)s %(name)s: %(message)s", verbose=verbose)


@cli.command(epilog="\b\nExamples:\n  promisefs umount /mnt/home\n  promisefs umount --wait 5 --force /mnt/home")
@click.argument("mountpoint", type=_UNTOUCHED)
@click.option("--force", is_flag=True, help="Even if it is in use, or holds data the server has not got.")
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(min=0, max=1e6),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for data to be stored.",
)
def umount(mountpoint: str, force: bool, wait_s: float) -> None:
    """Store what is not stored yet, unmount, and wait until the mount's process has ended."""
    unmount_entry(find_mount(mountpoint), force, wait_s)


@cli.command(
    epilog="\b\nExamples:\n  promisefs status\n"
    "  promisefs status /mnt/home --json\n  promisefs status /mnt/home --mmaps"
)
@click.argument("mountpoint", type=_UNTOUCHED, required=False)
@click.option("--mmaps", is_flag=True, help="Files that are open or may be mapped, and the processes that have them.")
@click.option("--json", "as_json", is_flag=True, help="For programs: one object, or a list of them without MOUNTPOINT.")
def status(mountpoint: str | None, mmaps: bool, as_json: bool) -> None:
    """Show one mount, or all of them. Answers at once, also when a server is away."""
    fetch = fetch_mmaps if mmaps else fetch_status
    if mountpoint is not None:
        report = fetch(find_mount(mountpoint))
        if as_json:
            click.echo(json.dumps(report))
        else:
            console().print(mmaps_table(report) if mmaps else mount_table(report))
        return
    reports = [_fetch_or_error(fetch, entry) for entry in list_mounts()]
    failed = any("error" in report for report in reports)
    if as_json:
        click.echo(json.dumps(reports))
    elif not reports:
        click.echo("nothing is mounted")
    elif mmaps:
        for report in reports:
            console().print(error_line(report) if "error" in report else mmaps_table(report))
    else:
        console().print(overview(reports))
        for report in reports:
            if "error" in report:
                click.echo(f"promisefs: {printable(report['error'])}", err=True)
    if failed:
        sys.exit(ExitCode.FAILURE)


def _fetch_or_error(fetch: Callable[[MountEntry], dict[str, Any]], entry: MountEntry) -> dict[str, Any]:
    try:
        return fetch(entry)
    except UserError as error:
        return {**place_of(entry), "error": str(error)}


cli.add_command(fs)
cli.add_command(login)
cli.add_command(tokens)
cli.add_command(logout)
cli.add_command(pts)
cli.add_command(rejects)
cli.add_command(top)
cli.add_command(install_helpers)
cli.add_command(install_man("promisefs", cli))
cli.add_command(trace)


def main() -> None:
    """Entry point: a mistake of the user's is one line and an exit code, never a traceback."""
    try:
        cli()
    except UserError as error:
        click.echo(f"promisefs: {error}", err=True)
        sys.exit(error.code)


if __name__ == "__main__":
    main()
