"""`promisefsd top`: what a server does, live."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.messages import GetStatistics
from promisefs_protocol.observe.live_screen import Draw, NoTerminal, show
from promisefs_protocol.transport import ConnectionLost, Peer, Reply

from promisefs_server.administration import control_socket
from promisefs_server.errors import StoreError
from promisefs_server.observe.activity import activity

from .failures import reported
from .top_view import server_screen

ANSWER_WAIT_S = 30.0


def _looks(directory: Path) -> Iterator[dict[str, Any]]:
    """What the server has done since the look before. Raise StoreError."""
    before: dict[str, Any] | None = None
    before_s = 0.0
    while True:
        report, now_s = trio.run(_fetch, directory), time.monotonic()
        yield {
            "time": round(time.time(), 3),
            **activity(before, report, report["up_s"] if before is None else now_s - before_s),
        }
        before, before_s = report, now_s


async def _fetch(directory: Path) -> dict[str, Any]:
    stream = await control_socket.connect(directory)
    if stream is None:
        raise StoreError(f"no server runs on {directory}: start one with 'promisefsd serve {directory}'")
    peer = Peer(stream, _refuse, "the server")
    statistics: bytes | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.run)
        with trio.move_on_after(ANSWER_WAIT_S), suppress(ConnectionLost):
            _, statistics = await peer.call(GetStatistics())
        nursery.cancel_scope.cancel()
    if statistics is None:
        raise StoreError(f"the server that uses {directory} has ended, or does not answer for {ANSWER_WAIT_S:g} s")
    report: dict[str, Any] = json.loads(statistics)
    return report


async def _refuse(request: Any, bulk: bytes | None, context: int) -> Reply:
    raise Aborted(AbortCode.NOT_INTRODUCED, "commands serve nothing")


@click.command(
    epilog="\b\nExamples:\n  promisefsd top /srv/promisefs\n  promisefsd top /srv/promisefs --json --interval 10\n\n"
    "Exit codes: 0 done, 1 failure, 2 usage, 3 no server runs on this store."
)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--interval", "interval_s", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, metavar="SECONDS"
)
@click.option("-n", "--count", type=click.IntRange(min=1), help="End after so many intervals.")
@click.option("--json", "as_json", is_flag=True, help="For programs: one object an interval.")
def top(directory: Path, interval_s: float, count: int | None, as_json: bool) -> None:
    """Show what the server that uses the store in DIR does, live: calls, clients, and whom changes wait for.

    The first picture is of all that was done since the server started, the others of one interval each.
    """
    looks = _looks(directory)
    with reported():
        try:
            if as_json:
                _print_looks(looks, interval_s, count)
            else:
                show(lambda: _picture(next(looks)), interval_s, count)
        except NoTerminal:
            raise click.UsageError("top draws on a terminal; for programs there is --json") from None
        except KeyboardInterrupt:
            return


def _picture(state: dict[str, Any]) -> Draw:
    return lambda size: server_screen(state, size)


def _print_looks(looks: Iterator[dict[str, Any]], interval_s: float, count: int | None) -> None:
    for number, look in enumerate(looks, 1):
        click.echo(json.dumps(look))
        if number == count:
            return
        time.sleep(interval_s)
