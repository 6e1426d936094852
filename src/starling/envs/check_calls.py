"""Calls into an environment that is checked: what goes wrong in them becomes a finding.

That is whatever is raised, `KeyboardInterrupt` and its like included, since nobody may catch those
by `except Exception`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import gymnasium as gym

from starling.envs.auto import random_action
from starling.envs.factories import CallableFactory, EnvFactory, EnvPoolFactory
from starling.envs.findings import Finding, Findings, cause
from starling.errors import UserError


class PhaseEndedError(Exception):
    """The environment failed, so the rest of a phase has no point; the finding is made."""


class CheckedCalls:
    """Makes, resets, steps and closes environments.

    Attributes:
        findings: Where failures go.
        seconds: How long a phase may take.
        calling: Told in a few words which call comes next, and how many seconds more than
            `seconds` it may take.
        interruptible: Whether Ctrl-C reaches this process: then it is the user's, and no finding.
    """

    def __init__(
        self,
        findings: Findings,
        seconds: float,
        calling: Callable[[str, float], None],
        interruptible: bool = True,
    ):
        self.findings, self.seconds, self.calling = findings, seconds, calling
        self.interruptible = interruptible

    @contextlib.contextmanager
    def phase(self, what: str) -> Iterator[None]:
        """A part of the check, after whose failure the others go on."""
        try:
            yield
        except PhaseEndedError:
            return
        except Exception:  # a mistake of the check's own
            raise
        except BaseException as error:  # out of something else that the environment brought along
            self._unless_the_users(error)
            if not any(found.name.endswith("raises") for found in self.findings.sorted()):
                self.findings.add(Finding("error", "raises", f"{what}: {cause(error)}"))

    def raised(self, name: str, what: str, error: BaseException) -> NoReturn:
        """Ends a phase, since something of the environment's raised an exception."""
        self._unless_the_users(error)
        self._fail(name, f"{what}: {cause(error)}")

    def _unless_the_users(self, error: BaseException) -> None:
        if self.interruptible and isinstance(error, KeyboardInterrupt):
            raise error

    @contextlib.contextmanager
    def made(self, factory: EnvFactory) -> Iterator[gym.Env]:
        """An environment, closed in the end."""
        env = self.make(factory)
        try:
            yield env
        finally:
            self.close(env)

    def make(self, factory: EnvFactory, what: str = "making it") -> gym.Env:
        """Makes an environment.

        Raises:
            UserError: Not the environment is at fault, but what it was asked for.
        """
        self.calling(what, 0.0)
        try:
            return factory()
        except UserError as error:
            if _is_starlings(factory):
                raise
            self._fail("interface", str(error))
        except BaseException as error:
            self.raised("constructor-raises", what, error)

    def reset(self, env: gym.Env, seed: int | None, where: str) -> tuple[Any, Any]:
        """Starts an episode: an observation, and an info."""
        where = where if seed is None else f"{where}, seed {seed}"
        result = self._call(where, "reset", lambda: env.reset(seed=seed, options=None))
        if not isinstance(result, tuple) or len(result) != 2:
            self._fail("reset-result", f"{where}: return (observation, info), not {_short(result)}")
        return result

    def step(self, env: gym.Env, action: Any, where: str) -> tuple[Any, Any, Any, Any, Any]:
        """Does a step: observation, reward, terminated, truncated and info."""
        result = self._call(where, "step", lambda: env.step(action))
        if not isinstance(result, tuple | list) or len(result) != 5:
            self._fail(
                "step-result",
                f"{where}: return (observation, reward, terminated, truncated, info), "
                f"not {_short(result)}",
            )
        observation, reward, terminated, truncated, info = result
        return observation, reward, terminated, truncated, info

    def choose(self, space: gym.Space, info: dict[str, Any], where: str) -> Any:
        """Draws an action, one that the mask in `info` allows."""
        return self._call(where, "sample", lambda: random_action(space, info))

    def close(self, env: gym.Env) -> None:
        """Closes an environment; that it cannot be is no reason to stop."""
        self.calling("close", 0.0)
        try:
            env.close()
        except BaseException as error:
            self._unless_the_users(error)
            self.findings.add(Finding("warning", "close-raises", f"close: {cause(error)}"))

    def _call(self, where: str, name: str, function: Callable[[], Any]) -> Any:
        self.calling(where, 0.0)
        try:
            return function()
        except UserError as error:  # Starling cannot make out what was returned
            self._fail(f"{name}-result", f"{where}: {error}")
        except BaseException as error:
            self.raised(f"{name}-raises", where, error)

    def _fail(self, name: str, message: str) -> NoReturn:
        self.findings.add(Finding("error", name, message))
        raise PhaseEndedError


def _is_starlings(factory: EnvFactory) -> bool:
    """Whether code of Starling's makes the environment, and knows what it refuses."""
    if isinstance(factory, CallableFactory):
        return factory.function.__module__.startswith("starling.")
    return isinstance(factory, EnvPoolFactory)


def _short(result: Any) -> str:
    if isinstance(result, tuple | list):
        return f"{len(result)} values"
    text = repr(result)
    return text if len(text) < 60 else f"a {type(result).__name__}"
