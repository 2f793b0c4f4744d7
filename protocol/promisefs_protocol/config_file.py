"""Configuration files: TOML, with the names that options have on the command line.

A command that is `Configured` takes --config FILE and --print-config. What the command line says counts before what the
file says, and that before the defaults. Nothing is read that was not named, and a key that is no option's name is
refused with its line: a typing mistake must not leave a default in force.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import click

_CONFIG = "promisefs_protocol.config_file"
"""Of the file, in the context's notes."""


class ConfigFileError(click.UsageError):
    """The file cannot be used. The message is for people, and names the file and, where there is one, the line."""


class Configured(click.Command):
    """A command whose parameters may come from a file: options by their long names, arguments by their own."""

    option_list: str | None = None
    """A parameter that is a list of NAME or NAME=VALUE, as -o of mount: the file says these as keys, too."""
    not_in_files: Collection[str] = ("help", "config", "print-config")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [
            click.Option(
                ["--config"], metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), is_eager=True,
                expose_value=False, callback=self._load, help="Take options from this TOML file, by the same names.",
            ),
            click.Option(
                ["--print-config"], is_flag=True, expose_value=False, callback=_note_print,
                help="Show what would be in force, as such a file, and end.",
            ),
        ]  # fmt: skip

    def keys(self) -> dict[str, click.Parameter]:
        """What a file may say, apart from `listed`."""
        keys = {}
        for parameter in self.params:
            if isinstance(parameter, click.Option):
                if parameter.hidden or parameter.name == self.option_list:
                    continue
                name = max(parameter.opts, key=len).removeprefix("--")
            else:
                name = str(parameter.name)
            if name not in self.not_in_files:
                keys[name] = parameter
        return keys

    def fault_of(self, item: str) -> str:
        """What is wrong with NAME or NAME=VALUE as one of `option_list`; empty if nothing is."""
        name = item.partition("=")[0]
        return f"no option is called {name!r}; there are {', '.join(sorted(self.keys()))}"

    def _load(self, context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
        if path is None or context.resilient_parsing:
            return
        text, values = _read(path)
        keys = self.keys()
        defaults: dict[str, Any] = {}
        listed = []
        for key, value in values.items():
            if isinstance(value, dict | list) or not isinstance(value, str | int | float):
                raise ConfigFileError(f"{path}, line {_line(text, key)}: {key} is no text, number, true or false")
            if key in keys:
                defaults[str(keys[key].name)] = value if isinstance(value, bool) else str(value)
            else:
                item = key if value is True else f"{key}={value}"
                if fault := self.fault_of(item):
                    raise ConfigFileError(f"{path}, line {_line(text, key)}: {fault}")
                if value is not False:
                    listed.append(item)
        context.default_map = defaults
        context.meta[_CONFIG] = tuple(listed)

    def invoke(self, ctx: click.Context) -> Any:
        if self.option_list is not None:
            # The command line's come last, and the last one counts.
            ctx.params[self.option_list] = (*ctx.meta.get(_CONFIG, ()), *ctx.params[self.option_list])
        if ctx.meta.get(_CONFIG + ".print"):
            self._print(ctx)
            return None
        return super().invoke(ctx)

    def _print(self, ctx: click.Context) -> None:
        origins = {
            click.core.ParameterSource.COMMANDLINE: "from the command line",
            click.core.ParameterSource.DEFAULT_MAP: "from the file",
        }
        for key, parameter in self.keys().items():
            value = ctx.params.get(str(parameter.name))
            origin = ctx.get_parameter_source(str(parameter.name))
            said = origins.get(origin, "the default") if origin is not None else "the default"
            click.echo(f"# {key} is not set" if value is None else f"{key} = {_as_toml(value)}  # {said}")
        if self.option_list is not None:
            items = dict(item.partition("=")[::2] for text in ctx.params[self.option_list] for item in text.split(","))
            for name, value in items.items():
                click.echo(f"{name} = {_as_toml(value) if value else 'true'}")


def _note_print(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    context.meta[_CONFIG + ".print"] = value


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        raise ConfigFileError(f"{path} is no text in UTF-8") from None
    except OSError as error:
        raise ConfigFileError(f"cannot read {path}: {error.strerror}") from None
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigFileError(f"{path}: {error}") from None


def _line(text: str, key: str) -> int:
    """Where a key of the top level is given its value; tomllib does not say."""
    wanted = re.compile(rf"""\s*\[*\s*["']?{re.escape(key)}["']?\s*[=.\]]""")
    return next((number for number, line in enumerate(text.splitlines(), 1) if wanted.match(line)), 1)


def _as_toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, int | float) else json.dumps(str(value), ensure_ascii=False)
