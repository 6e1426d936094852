"""What a search over settings draws from: ranges of numbers, and lists of choices.

Beside its parameters a dataclass declares `SEARCH`, the ranges of those that are worth searching. A
class that inherits it may give others, or None for what its algorithm has no use for.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Container, Mapping
from typing import Any

from starling.errors import UserError
from starling.options import Option, convert, options, unknown_option

_SCALES = ("linear", "log", "near_1")
_STEP = 0.05  # share of a range by which a value moves
_DRAWN_ANEW = 0.25  # probability that it is drawn instead (Jaderberg et al. 2017)


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, whole ones if both are.

    Attributes:
        low: The least.
        high: The greatest.
        scale: What is uniform: the number (linear), its logarithm (log), or that of its distance
            from 1 (near_1).
        in_run: Whether a run may go on with another value.
    """

    low: float
    high: float
    scale: str = "linear"
    in_run: bool = False

    def draw(self, random: random.Random) -> Any:
        """Return any value."""
        return self._at(random.random())

    def move(self, value: Any, random: random.Random) -> Any:
        """Return a neighbour of a value, or any other."""
        if value is None or random.random() < _DRAWN_ANEW:
            return self.draw(random)
        start, end = self._scaled(self.low), self._scaled(self.high)
        share = (self._scaled(self._inside(value)) - start) / (end - start)
        return self._at(min(1.0, max(0.0, share + random.choice((-_STEP, _STEP)))))

    def _at(self, share: float) -> Any:
        start, end = self._scaled(self.low), self._scaled(self.high)
        value = start + share * (end - start)
        if self.scale == "near_1":
            value = 1 - _short(math.exp(-value))
        elif self.scale == "log":
            value = math.exp(value)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return round(value)
        return self._inside(round(value, 10) if self.scale == "near_1" else _short(value))

    def _scaled(self, value: float) -> float:
        if self.scale == "near_1":
            return -math.log(1 - value)
        return math.log(value) if self.scale == "log" else value

    def _inside(self, value: float) -> float:
        return min(max(value, self.low), self.high)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several values, in an order in which neighbours are alike.

    Attributes:
        values: What there is.
        in_run: Whether a run may go on with another value.
    """

    values: tuple[Any, ...]
    in_run: bool = False

    def draw(self, random: random.Random) -> Any:
        """Return any value."""
        return random.choice(self.values)

    def move(self, value: Any, random: random.Random) -> Any:
        """Return a neighbour of a value, or any other."""
        if value not in self.values or random.random() < _DRAWN_ANEW:
            return self.draw(random)
        index = self.values.index(value) + random.choice((-1, 1))
        return self.values[min(max(index, 0), len(self.values) - 1)]


Space = dict[str, Range | Choice]
Ranges = Mapping[str, Range | Choice | None]


def declared_space(config_class: type) -> Space:
    """Return the ranges that a configuration's dataclasses declare, by setting."""
    found: dict[str, Any] = {}
    for cls in reversed(config_class.__mro__):
        found |= vars(cls).get("SEARCH", {})
    return {name: domain for name, domain in found.items() if domain is not None}


def read_space(content: Mapping[str, Any], config_class: type, allowed: Container[str]) -> Space:
    """Return the declared ranges, with those that a user gives in their place.

    Args:
        content: By setting a list of values, a table `{low, high, scale}`, or False: not searched.
        config_class: The configuration whose settings they are.
        allowed: Settings that may be searched.

    Raises:
        UserError: A setting or a range that cannot be searched.
    """
    space, known = declared_space(config_class), options(config_class)
    for name, given in content.items():
        if name not in known:
            raise unknown_option(name, known, command="starling tune")
        if name not in allowed:
            raise UserError(
                f"{name} cannot be searched, as it is no matter of learning: give it as an option, "
                "and leave it out of the space"
            )
        if given is False:
            space.pop(name, None)
        else:
            in_run = name in space and space[name].in_run
            space[name] = _read_domain(known[name], given, in_run)
    return space


def _read_domain(option: Option, given: Any, in_run: bool) -> Range | Choice:
    name = option.name
    if isinstance(given, list):
        if len(given) < 2:
            raise UserError(f"{name} has {len(given)} values to search: give two, or false")
        return Choice(tuple(convert(option, value) for value in given), in_run)
    keys = set(given) if isinstance(given, Mapping) else set()
    if not {"low", "high"} <= keys <= {"low", "high", "scale"}:
        raise UserError(
            f"the range of {name} must be a list of values, {{low = ..., high = ..., scale = ...}} "
            f"or false (not searched), not {given!r}"
        )
    if option.kind not in ("int", "float"):
        raise UserError(f"{name} is no number and has no range: give a list of values to search")
    scale = given.get("scale", "linear")
    if scale not in _SCALES:
        raise UserError(f"unknown scale {scale!r} of {name}: there are {', '.join(_SCALES)}")
    low, high = (convert(option, given[key]) for key in ("low", "high"))
    if low is None or high is None or not low < high:
        raise UserError(f"the range of {name} goes from {low} to {high}: low must be below high")
    if scale == "log" and low <= 0:
        raise UserError(f"{name} has a low of {low}, where scale log needs one above 0")
    if scale == "near_1" and high >= 1:
        raise UserError(f"{name} has a high of {high}, where scale near_1 needs one below 1")
    return Range(low, high, scale, in_run)


def _short(value: float) -> float:
    """Rounds to three digits, which are easier to read and to pass on."""
    return float(f"{value:.3g}")
