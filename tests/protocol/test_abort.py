"""The abort table, both ways."""

from __future__ import annotations

import errno

import pytest
from promisefs_protocol.abort import AbortCode, Aborted, code_of, errno_of


@pytest.mark.parametrize("code", list(AbortCode), ids=lambda code: code.name)
def test_every_code_has_an_errno_and_that_errno_a_code(code: AbortCode) -> None:
    number = errno_of(code)
    assert number in errno.errorcode
    assert errno_of(code_of(number)) == number


@pytest.mark.parametrize("code", [c for c in AbortCode if c < 100], ids=lambda code: code.name)
def test_codes_named_after_an_errno_mean_that_errno(code: AbortCode) -> None:
    name = {"NOTSUP": "EOPNOTSUPP"}.get(code.name, "E" + code.name)
    assert errno_of(code) == getattr(errno, name)
    assert code_of(getattr(errno, name)) is code


def test_numbers_are_the_protocol_and_never_change() -> None:
    assert {c.name: int(c) for c in AbortCode} == {
        "VNOVNODE": 102, "VNOVOL": 103, "VMOVED": 111, "VOFFLINE": 106, "PERM": 1, "NOENT": 2, "IO": 5, "AGAIN": 11,
        "ACCES": 13, "BUSY": 16, "EXIST": 17, "XDEV": 18, "NOTDIR": 20, "ISDIR": 21, "INVAL": 22, "FBIG": 27,
        "NOSPC": 28, "ROFS": 30, "MLINK": 31, "DEADLK": 35, "NAMETOOLONG": 36, "NOLCK": 37, "NOTEMPTY": 39, "LOOP": 40,
        "NODATA": 61, "NOTSUP": 95, "DQUOT": 122, "XATTR_TOO_BIG": 123, "CHANGED": 124, "KEYEXPIRED": 127,
        "KEYREVOKED": 128, "KEYREJECTED": 129, "UNKNOWN_METHOD": 200, "BAD_MESSAGE": 201, "BAD_VERSION": 202,
        "NOT_INTRODUCED": 203, "NO_CALLBACKS": 204, "SHUTTING_DOWN": 205, "TOO_MANY": 206, "INTERNAL": 207,
    }  # fmt: skip


def test_codes_and_errnos_from_elsewhere_become_an_input_output_error() -> None:
    assert errno_of(99999) == errno.EIO
    assert errno_of(-1) == errno.EIO
    assert code_of(0) is AbortCode.IO
    assert code_of(errno.EMFILE) is AbortCode.IO
    assert code_of(errno.EIO) is AbortCode.IO
    assert code_of(errno.EINVAL) is AbortCode.INVAL
    assert code_of(errno.ESTALE) is AbortCode.VNOVNODE
    assert code_of(errno.E2BIG) is AbortCode.XATTR_TOO_BIG


def test_an_abort_names_itself() -> None:
    assert str(Aborted(AbortCode.NOENT, "no such name")) == "NOENT: no such name"
    assert str(Aborted(AbortCode.NOENT)) == "NOENT"
    assert str(Aborted(4711, "x")) == "abort 4711: x"
    assert Aborted(AbortCode.VNOVNODE).errno == errno.ESTALE
