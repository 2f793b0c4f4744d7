"""The tables in docs/protocol.md, made from the code. Run this file to write them there anew."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any, ForwardRef

from promisefs_protocol import messages
from promisefs_protocol.abort import AbortCode, errno_of
from promisefs_protocol.identity_messages import Principal
from promisefs_protocol.ids import Fid, PromisedStatus, Status
from promisefs_protocol.locks import HeldLock, Lock, LockOwner
from promisefs_protocol.messages import (
    CONTROL_METHODS,
    METHODS,
    Break,
    LockAnswer,
    Operation,
    VolumeEntry,
    VolumeInfo,
)
from promisefs_protocol.rights import AclEntry

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"
MARK = "<!-- {name}: made by tests/protocol/method_table.py -->\n"
END = "\n<!-- end -->"
PARTS: tuple[type[Any], ...] = (
    Fid, Status, PromisedStatus, Operation, Break, LockOwner, Lock, HeldLock, LockAnswer, AclEntry, VolumeEntry,
    VolumeInfo, Principal,
)  # fmt: skip


def type_text(annotation: str) -> str:
    """An annotation as people read it: `Annotated[int, int_range(0, 7)]` is `int 0..7`."""
    annotation = re.sub(r"Annotated\[int, int_range\((.+?), (.+?)\)\]", r"int \1..\2", annotation)
    annotation = re.sub(r"Annotated\[(.*), length_range\((\w+), (\w+)\)\]", r"\1 of length \2..\3", annotation)
    annotation = annotation.replace("tuple[", "array[").replace(", ...]", "]")
    return annotation.replace("MAX_LIST", str(messages.MAX_LIST)).replace("MAX_FILE_BYTES", "2 ** 63 - 1")


def fields_text(cls: type[Any]) -> str:
    annotations: dict[str, ForwardRef] = cls.__annotations__
    return ", ".join(f"{name}: {type_text(hint.__forward_arg__)}" for name, hint in annotations.items())


def cell(text: str) -> str:
    return f"`{text}`" if text else "-"


def who_calls(method: str) -> str:
    if method == "HELLO":
        return "client, on both"
    if method == "CB.RenewLease":
        return "client, on callbacks"
    if method in CONTROL_METHODS:
        return "promisefsd, on control"
    if method.startswith(("SEC.", "PT.")):
        return "client, on calls and commands; promisefsd, on control"
    return "server, on callbacks" if method.startswith("CB.") else "client, on calls"


def methods_table() -> str:
    rows = ["| method | who | arguments | reply |", "| --- | --- | --- | --- |"]
    for method in METHODS.values():
        arguments, reply = fields_text(method.request), fields_text(method.reply)
        row = f"| {method.name} | {who_calls(method.name)} | {cell(arguments)} | {cell(reply)} |"
        rows.append(row.replace(" | None", " or nil").replace("PromisedStatus | U32", "PromisedStatus or U32"))
    return "\n".join(rows)


def parts_table() -> str:
    rows = ["| type | fields |", "| --- | --- |"]
    rows += [f"| {cls.__name__} | {cell(fields_text(cls))} |" for cls in PARTS]
    return "\n".join(rows)


def aborts_table() -> str:
    rows = ["| code | name | errno |", "| --- | --- | --- |"]
    rows += [f"| {int(code)} | {code.name} | {errno.errorcode[errno_of(code)]} |" for code in sorted(AbortCode)]
    return "\n".join(rows)


TABLES = {"methods": methods_table, "parts": parts_table, "aborts": aborts_table}


def written(document: str, name: str) -> str | None:
    """The table `name` as the document has it, or None."""
    _, mark, rest = document.partition(MARK.format(name=name))
    return rest.partition(END)[0] if mark else None


def renewed(document: str) -> str:
    for name, make in TABLES.items():
        old = written(document, name)
        assert old is not None, name
        start, _, rest = document.partition(MARK.format(name=name))
        document = start + MARK.format(name=name) + make() + rest.removeprefix(old)
    return document


if __name__ == "__main__":
    DOCUMENT.write_text(renewed(DOCUMENT.read_text()))
