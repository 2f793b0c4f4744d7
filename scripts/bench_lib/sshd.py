"""An ssh server of our own for sshfs, on a free port of the loopback interface, with keys that nobody else has."""

from __future__ import annotations

import getpass
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

START_S = 20.0
_CONFIGURATION = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
Subsystem sftp internal-sftp
"""


class SshdUnusable(Exception):
    """The message says why."""


class Sshd:
    """Lets the user who starts it in, and nobody else, until `close`."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        """Raise SshdUnusable."""
        program = shutil.which("sshd", path="/usr/sbin:/sbin:/usr/local/sbin:/usr/bin:/bin")
        for name in ("ssh", "ssh-keygen", "sshfs"):
            if shutil.which(name) is None:
                raise SshdUnusable(f"{name} is not installed")
        if program is None:
            raise SshdUnusable("sshd is not installed")
        directory.mkdir(mode=0o700)
        self._directory = directory
        for key in ("host_key", "user_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / key)]
            subprocess.run(command, check=True, capture_output=True, timeout=START_S)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port: int = free.getsockname()[1]
        configuration = directory / "sshd_config"
        configuration.write_text(_CONFIGURATION.format(port=self._port, directory=directory))
        with suppress(PermissionError):
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where a root's sshd puts those who have not logged in
        self._log = directory / "sshd.log"
        command = [program, "-D", "-f", str(configuration), "-E", str(self._log)]
        self._process = subprocess.Popen(command, env=environment)
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.close()
            raise

    def _wait_until_it_answers(self) -> None:
        deadline_s = time.monotonic() + START_S
        command = ["ssh", *self.options, f"{getpass.getuser()}@127.0.0.1", "true"]
        while True:
            done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
            if not done.returncode:
                return
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                said = self._log.read_text() if self._log.exists() else ""
                raise SshdUnusable(f"no session with an sshd of our own: {done.stderr.strip()} {said.strip()}")
            time.sleep(0.1)

    @property
    def options(self) -> list[str]:
        """For ssh and sshfs."""
        settings = (
            f"Port={self._port}",
            f"IdentityFile={self._directory / 'user_key'}",
            "IdentitiesOnly=yes",
            "BatchMode=yes",
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "LogLevel=ERROR",
        )
        return [part for setting in settings for part in ("-o", setting)]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(START_S)
