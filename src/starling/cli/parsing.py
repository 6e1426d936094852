"""Reading command lines: argparse, with one-sentence errors and options from dataclasses.

argparse alone would print its usage before an error, and takes one spelling of each option.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from starling.errors import UserError
from starling.options import Option, group_title, options, parse, show_default, unknown_option
from starling.training.signals import GRACE_SECONDS, StopSignals

_NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_DAY = 86_400  # seconds


class Parser(argparse.ArgumentParser):
    """A parser of one command, whose errors are `UserError`."""

    def __init__(self, command: str, description: str, examples: str = "", usage: str = ""):
        """Make a parser that knows --help and --json."""
        super().__init__(
            prog=f"starling {command}",
            usage=f"starling {command} {usage}" if usage else None,
            description=description,
            epilog=examples,
            allow_abbrev=False,
            formatter_class=_formatter,
        )
        self.add_argument(
            "--json", action="store_true", help="print one JSON object as the last line"
        )

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found as a `UserError`."""
        raise UserError(f"{message} (see {self.prog} --help)")

    def read(
        self, arguments: list[str], elsewhere: Mapping[str, str] = MappingProxyType({})
    ) -> argparse.Namespace:
        """Parse a command line.

        `--num-envs` means `--num_envs`, and a switch is `--x`, `--no_x` or `--x True|False`.

        Args:
            arguments: The words of it.
            elsewhere: What to say of options that there are under other circumstances, by name.

        Raises:
            UserError: An option that there is not, or a value that it cannot take.
        """
        namespace, unread = self.parse_known_args(self._normalise(arguments))
        if unread:
            first = next((word for word in unread if word.startswith("-")), unread[0])
            if not first.startswith("--"):
                self.error(f"unexpected argument {first!r}")
            known = [name.removeprefix("--") for name in self._option_string_actions]
            name = first.removeprefix("--").partition("=")[0]
            if why := elsewhere.get(name.replace("-", "_")):
                raise UserError(f"--{name} {why}")
            raise unknown_option(name, known, prefix="--", command=self.prog)
        return namespace

    def add_options(self, config_class: type) -> None:
        """Add every field of a configuration dataclass, in groups, without defaults."""
        groups: dict[type, Any] = {}
        for option in options(config_class).values():
            if option.group not in groups:
                groups[option.group] = self.add_argument_group(group_title(option.group))
            _add_option(groups[option.group], option)

    def _normalise(self, arguments: list[str]) -> list[str]:
        """Spell options as the parser knows them, and join them with values that look like one."""
        words: list[str] = []
        waiting = list(arguments)
        while waiting:
            word = waiting.pop(0)
            name, equals, value = word.partition("=")
            action = self._option_string_actions.get(name) or self._option_string_actions.get(
                name := "--" + name[2:].replace("-", "_")
            )
            if not word.startswith("--") or action is None:
                words.append(word)
                continue
            follows = waiting[0] if waiting else ""
            if action.nargs == 0:
                if not equals and follows.lower() in ("true", "false"):
                    equals, value = "=", waiting.pop(0)
                words += _switch(name, value if equals else "true", action.option_strings)
            elif equals or _NEGATIVE_NUMBER.fullmatch(follows):
                words.append(f"{name}={value if equals else waiting.pop(0)}")
            else:
                words.append(name)
        return words


def add_grace_seconds(parser: Parser) -> None:
    """Add the option that says how long a signal may take to stop the command."""
    parser.add_argument(
        "--grace_seconds",
        type=float,
        default=GRACE_SECONDS,
        metavar="X",
        help="seconds from Ctrl-C or SIGTERM to the end; who is not done by then (an environment "
        f"hangs, say) is ended, and what was saved is kept (default: {GRACE_SECONDS:g})",
    )


def stop_signals(args: argparse.Namespace) -> StopSignals:
    """Return what notes the signals of a command with `--grace_seconds`.

    Raises:
        UserError: The number is no time to wait.
    """
    if not 0 < args.grace_seconds <= _DAY:
        raise UserError(
            f"grace_seconds must be above 0 and at most {_DAY}, not {args.grace_seconds:g}"
        )
    return StopSignals(args.grace_seconds)


def given_options(namespace: argparse.Namespace, config_class: type) -> dict[str, Any]:
    """Return the configuration's values that the command line gives, by name."""
    known = options(config_class)
    texts = {name: text for name, text in vars(namespace).items() if name in known}
    return {
        name: text if isinstance(text, bool) else parse(known[name], text)
        for name, text in texts.items()
    }


def print_json(content: Mapping[str, Any]) -> None:
    """Print one JSON object on one line."""
    print(json.dumps(content), flush=True)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return rows of words in aligned columns; what looks like a number stands to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    right = [
        all(row[column][:1].isdigit() for row in rows) and bool(rows)
        for column in range(len(header))
    ]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _formatter(prog: str) -> argparse.HelpFormatter:
    width = min(shutil.get_terminal_size().columns, 100)
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=width)


def _add_option(group: Any, option: Option) -> None:
    default = "required" if option.required else f"default: {show_default(option)}"
    meaning = f"{option.doc} ({default})".replace("%", "%%")
    common = {"dest": option.name, "default": argparse.SUPPRESS, "help": meaning}
    if option.kind == "bool":
        group.add_argument(f"--{option.name}", f"--no_{option.name}", action=_Switch, **common)
        return
    metavar = {"int": "N", "float": "X", "ints": "N", "dict": "JSON"}.get(option.kind, "NAME")
    if option.choices:
        words = option.choices if option.kind == "str" else (metavar, *option.choices)
        metavar = "|".join(words)
    if option.kind == "ints":
        common["nargs"] = "*"
    group.add_argument(f"--{option.name}", metavar=metavar, **common)


class _Switch(argparse.Action):
    """`--x` and `--no_x`."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Set the value that the spelling says."""
        setattr(namespace, self.dest, not (option_string or "").startswith("--no_"))


def _switch(name: str, value: str, spellings: Any) -> list[str]:
    """Return how a switch and its value are spelt without a value."""
    if value.lower() not in ("true", "false"):
        raise UserError(f"{name} must be True or False, not {value}")
    if value.lower() == "true":
        return [name]
    opposite = f"--no_{name[2:]}" if not name.startswith("--no_") else f"--{name[5:]}"
    return [opposite] if opposite in spellings else []
