"""Any vector environment that a user already has, made to keep Starling's contract."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector import VectorEnv as GymnasiumVectorEnv

from starling.envs.guards import OwnGuard
from starling.envs.infos import add_final_observations
from starling.envs.safety import Safety
from starling.envs.spaces import flatten, leaves, unflatten
from starling.envs.vector_env import VectorEnv, check_infos
from starling.errors import UserError

_FINAL = ("final_obs", "_final_obs", "final_info", "_final_info")
_LEGACY_FINAL = "final_observation"  # Gymnasium's name before 1.0


class VectorEnvAdapter(VectorEnv):
    """A `gymnasium.vector.VectorEnv` of the user's, whatever its autoreset mode.

    - `SAME_STEP`: nothing changes.
    - `DISABLED`: what ended is reset in the same step, through `options["reset_mask"]`.
    - `NEXT_STEP`: the step after an episode's end only resets, and its action is ignored; such
      rows have `infos["valid"]` False. Until then `observations` holds the last observation.

    A vector environment that does not name its mode is taken for `NEXT_STEP`, as Gymnasium's are
    by default, with a warning, unless its infos hold final observations: then it is `SAME_STEP`.

    Seeds are passed on as they are given, since not every vector environment takes a list.
    """

    backend = "gymnasium"

    def __init__(
        self,
        env: GymnasiumVectorEnv,
        *,
        seed: int | None = None,
        infos: str = "final",
        copy: bool = True,
        safety: Safety = Safety(),  # noqa: B008 - immutable
    ):
        """Takes over `env`; closing the adapter closes it.

        Args:
            env: The vector environment.
            seed: Seed of the first reset that is given none.
            infos: `"final"` or `"all"`, as for `make_vec`.
            copy: Return copies, in case that `env` writes every step into the same arrays.
            safety: What to do about invalid data; its failures are its own.

        Raises:
            UserError: A space that cannot be handled.
        """
        check_infos(infos)
        safety.require_no_recovery(
            f"a {type(env).__name__} that exists", "give an id or a factory in its place"
        )
        self.env = env
        self._seed = seed
        self._all_infos = infos == "all"
        self._copy = copy or safety.on_invalid_data == "replace"  # not in the user's own arrays
        self._guard = OwnGuard(
            env.single_observation_space, env.single_action_space, safety, env.num_envs
        )
        self._leaves = leaves(env.single_observation_space)
        leaves(env.single_action_space)
        self._mode = _mode_of(env)
        self._describe(
            env.num_envs,
            env.single_observation_space,
            env.single_action_space,
            metadata=env.metadata,
            spec=env.spec,
            render_mode=env.render_mode,
        )
        self._actions: Any = None
        self._has_reset = False
        self._ended = np.zeros(env.num_envs, bool)

    # ---- resets and steps

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """See `VectorEnv.reset`; seeds and options are passed on."""
        self._check_open()
        first, self._seed = self._seed, None
        seed = first if seed is None else seed
        mask = None if options is None else options.get("reset_mask")
        if seed is not None:
            self._guard.seeds = seed
        given = None if options is None else dict(options)  # Gymnasium's takes the mask out
        observations, infos = self.env.reset(seed=seed, options=given)  # type: ignore[arg-type]
        self._ended[slice(None) if mask is None else mask] = False
        self._actions, self._has_reset = None, True
        return self._observations(observations, None, infos), infos

    def send(self, actions: Any, env_ids: Sequence[int] | np.ndarray | None = None) -> None:
        """Keeps the actions for `recv`, which does the step."""
        self._check_open()
        if not self._has_reset:
            raise UserError("reset() comes before the first step")
        if self._actions is not None:
            raise UserError("a step is under way: recv() its result before the next send()")
        if env_ids is not None and not np.array_equal(env_ids, np.arange(self.num_envs)):
            raise UserError(
                f"{type(self.env).__name__} steps all of its environments at once: "
                "leave out env_ids"
            )
        self._check_actions(actions)
        self._actions = actions

    def _check_actions(self, actions: Any) -> None:
        space = self.single_action_space
        for leaf, values in zip(leaves(space), flatten(space, actions), strict=True):
            expected = (self.num_envs, *leaf.shape)
            if np.shape(values) != expected:
                name = f"actions {leaf.name!r}" if leaf.path else "actions"
                raise UserError(f"{name}: shape {np.shape(values)} given, {expected} expected")

    def recv(self) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Does the step that `send` asked for; see `VectorEnv.recv`."""
        self._check_open()
        actions, self._actions = self._actions, None
        if actions is None:
            raise UserError("nothing to receive: send() actions first")
        self._guard.steps += 1
        observations, rewards, terminations, truncations, infos = self.env.step(actions)
        rewards = np.array(rewards, np.float64)
        terminations = np.array(terminations, bool)
        truncations = np.array(truncations, bool)
        ended = terminations | truncations
        rows = np.flatnonzero(ended)
        if self._mode is None and len(rows):
            named = "final_obs" in infos or _LEGACY_FINAL in infos
            self._mode = AutoresetMode.SAME_STEP if named else AutoresetMode.NEXT_STEP
            if not named:
                warnings.warn(
                    f"{type(self.env).__name__} does not say when it resets: NEXT_STEP is assumed, "
                    "whose step after an episode's end is no experience; set "
                    'metadata["autoreset_mode"] to a gymnasium.vector.AutoresetMode',
                    stacklevel=3,
                )
        kept = dict(infos) if self._all_infos else _without_details(infos, len(rows) > 0)
        if self._mode is AutoresetMode.SAME_STEP:
            if len(rows):
                self._name_final(kept, infos, rows)
        elif self._mode is AutoresetMode.DISABLED:
            if len(rows):
                observations = self._reset_ended(observations, infos, kept, ended, rows)
        else:
            kept["valid"] = ~self._ended
            if len(rows):
                self._add_final(kept, observations, infos, rows)
                if "action_mask" in kept:  # an end may allow none: the next action is ignored
                    mask = kept["action_mask"]
                    kept["action_mask"] = _merged(np.ones_like(mask), mask, ended)
        self._ended = ended
        observed = self._observations(observations, rewards, kept)
        if len(rows):
            # Where a reset takes a step, they are observations as well, and counted as such.
            twice = self._mode is AutoresetMode.NEXT_STEP
            faults = Counter[str]() if twice else self.faults
            self._guard.enforce_finals(kept, truncations & ~terminations, faults)
        return observed, rewards, terminations, truncations, kept

    def _reset_ended(
        self, observations: Any, infos: dict, kept: dict, ended: np.ndarray, rows: np.ndarray
    ) -> Any:
        self._add_final(kept, observations, infos, rows)
        first, reset_infos = self.env.reset(options={"reset_mask": ended.copy()})
        wanted = reset_infos if self._all_infos else _without_details(reset_infos, False)
        for name, value in wanted.items():
            kept[name] = _merged(value, kept.get(name), ended)
        return first

    def _add_final(self, kept: dict, observations: Any, infos: dict, rows: np.ndarray) -> None:
        ended = np.isin(np.arange(self.num_envs), rows)
        kept["final_info"] = {
            name: value & ended if name.startswith("_") and _is_mask(value) else value
            for name, value in infos.items()
        }
        space = self.single_observation_space
        add_final_observations(kept, space, self._arrays(observations), rows)

    def _name_final(self, kept: dict, infos: dict, rows: np.ndarray) -> None:
        """Checks the final observations, and brings them into one form."""
        given = infos.get("final_obs", infos.get(_LEGACY_FINAL))
        final = np.full(self.num_envs, None, object)
        for row in rows:
            value = None if given is None else _row(given, row)
            if value is None:
                raise UserError(
                    f"{type(self.env).__name__} ended an episode without giving its last "
                    "observation: with autoreset mode SAME_STEP infos['final_obs'] has to hold it"
                )
            final[row] = value
        kept["final_obs"] = final
        kept["_final_obs"] = np.isin(np.arange(self.num_envs), rows)
        kept.setdefault("final_info", {})
        kept.setdefault("_final_info", kept["_final_obs"].copy())

    # ---- forms

    def _arrays(self, observations: Any) -> list[np.ndarray]:
        values = flatten(self.single_observation_space, observations)
        return [np.asarray(x, leaf.dtype) for x, leaf in zip(values, self._leaves, strict=True)]

    def _observations(self, observations: Any, rewards: np.ndarray | None, infos: dict) -> Any:
        arrays = self._arrays(observations)
        if self._copy:
            arrays = [array.copy() for array in arrays]
        self._guard.enforce(arrays, rewards, infos.get("action_mask"), self.faults)
        return unflatten(self.single_observation_space, arrays)

    # ---- the rest

    def render(self) -> Any:
        """What the vector environment renders."""
        return self.env.render()

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Calls a method of every environment, or reads an attribute; a value for each."""
        return self.env.call(name, *args, **kwargs)  # type: ignore[attr-defined]

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """Reads an attribute of every environment."""
        return self.env.get_attr(name)  # type: ignore[attr-defined]

    def set_attr(self, name: str, values: Any) -> None:
        """Sets an attribute of every environment."""
        self.env.set_attr(name, values)  # type: ignore[attr-defined]

    def close_extras(self, **kwargs: Any) -> None:
        """Closes the vector environment."""
        self.env.close(**kwargs)


def _mode_of(env: GymnasiumVectorEnv) -> AutoresetMode | None:
    """Its autoreset mode; None if it does not say."""
    mode = env.metadata.get("autoreset_mode")
    if mode is None or isinstance(mode, AutoresetMode):
        return mode
    try:
        return AutoresetMode(mode)
    except ValueError:
        modes = ", ".join(member.value for member in AutoresetMode)
        raise UserError(
            f"{type(env).__name__} has metadata['autoreset_mode'] {mode!r}; it must be {modes}"
        ) from None


def _without_details(infos: dict, ended: bool) -> dict[str, Any]:
    """The infos that a trainer uses, which are few and cheap."""
    names = ("action_mask", "_action_mask", *(_FINAL if ended else ()))
    return {name: infos[name] for name in names if name in infos}


def _row(values: Any, row: int) -> Any:
    """One row of an object array, of a batch, or of a batch nested in a dict or tuple."""
    if isinstance(values, dict):
        return {key: _row(value, row) for key, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_row(value, row) for value in values)
    value = values[row]
    objects = isinstance(values, np.ndarray) and values.dtype.hasobject
    return value if objects else np.array(value)


def _is_mask(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.bool_


def _merged(new: Any, old: Any, rows: np.ndarray) -> Any:
    """Values of a reset over those of a step, in the rows that were reset."""
    if not isinstance(new, np.ndarray) or not isinstance(old, np.ndarray):
        return new if old is None else old
    merged = old.copy()
    merged[rows] = new[rows]
    return merged
