"""The cell file: what is understood, and one clear line for whatever is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from promisefs_protocol.cell_file import CellFile, CellFileError, CellServer, load_cell_file

NAME = 'name = "example.org"\n'
ALPHA = '[[server]]\nnumber = 0\naddress = "alpha.example.org:7654"\n'
BETA = '[[server]]\nnumber = 127\naddress = "[::1]:7000"\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cell.toml"


def test_a_cell_of_two_servers(path: Path) -> None:
    path.write_text(NAME + BETA + ALPHA)
    cell = load_cell_file(path)
    beta = CellServer(127, "::1", 7000)
    assert cell == CellFile("example.org", (beta, CellServer(0, "alpha.example.org", 7654)))
    assert cell.server(127) is cell.servers[0] and cell.server(1) is None
    assert str(beta.address) == "[::1]:7000"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("name = ", "not TOML"),
        ("", "'name' is missing"),
        (NAME, "'server' is missing"),
        (ALPHA, "'name' is missing"),
        ('name = ""\n' + ALPHA, "cell's name ''"),
        ('name = "a/b"\n' + ALPHA, "cell's name 'a/b'"),
        ("name = 3\n" + ALPHA, "cell's name 3"),
        (NAME + "colour = 1\n" + ALPHA, "'colour'"),
        (NAME + "server = []", "at least one"),
        (NAME + "server = [1]", "at least one"),
        (NAME + "[server]\nnumber = 0", "at least one"),
        (NAME + ALPHA + "port = 3", "'port' in [[server]] table 1"),
        (NAME + ALPHA + '[[server]]\naddress = "b:1"', "'number' is missing in [[server]] table 2"),
        (NAME + ALPHA + "[[server]]\nnumber = 1", "'address' is missing in [[server]] table 2"),
        (NAME + ALPHA.replace("= 0", "= 128"), "128"),
        (NAME + ALPHA.replace("= 0", "= -1"), "-1"),
        (NAME + ALPHA.replace("= 0", "= true"), "True"),
        (NAME + ALPHA.replace("= 0", '= "0"'), "'0'"),
        (NAME + ALPHA.replace(":7654", ":77777"), "no port 77777"),
        (NAME + ALPHA.replace(":7654", ":0"), "no port 0"),
        (NAME + ALPHA.replace("alpha.example.org", ""), "':7654'"),
        (NAME + '[[server]]\nnumber = 0\naddress = 7654', "7654"),
        (NAME + ALPHA + ALPHA.replace("alpha", "beta"), "two servers have the number 0"),
        (NAME + ALPHA + ALPHA.replace("= 0", "= 1").replace("alpha", "ALPHA"), "two servers have the address ALPHA"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(path: Path, text: str, complaint: str) -> None:
    path.write_text(text)
    with pytest.raises(CellFileError) as caught:
        load_cell_file(path)
    message = str(caught.value)
    assert complaint in message and str(path) in message and "\n" not in message


def test_a_file_that_cannot_be_read(path: Path) -> None:
    with pytest.raises(CellFileError, match="No such file"):
        load_cell_file(path)
    with pytest.raises(CellFileError, match="directory"):
        load_cell_file(path.parent)
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(CellFileError, match="not TOML"):
        load_cell_file(path)
    path.write_bytes(bytes(2 << 20))
    with pytest.raises(CellFileError, match="no cell file"):
        load_cell_file(path)
