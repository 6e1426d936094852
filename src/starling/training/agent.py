"""A policy that acts, learns and is saved: what trainers and users' own loops share."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from starling.algorithms.acting import Acting
from starling.algorithms.ppo import PPO
from starling.algorithms.ppo_state import TrainState
from starling.configs import TrainConfig
from starling.envs.spaces import Leaf, choice_counts, leaves
from starling.errors import CheckpointError, UserError
from starling.networks.features import find_images
from starling.storage.checkpoint import Checkpoint, flatten_tree, restore_tree
from starling.storage.rollout import Rollout, map_tree
from starling.storage.space_format import space_from_json, space_to_json
from starling.training.device import find_devices, mesh_of, on_all, on_first, prepare_cpu
from starling.training.sampler import Action, Sampler

Tree = Any


class Agent:
    """A policy for one pair of spaces, with all that it needs to go on learning.

    Attributes:
        algorithm_class: What makes its algorithm; another one in a trainer of one's own.
        algorithm: Its pure functions.
        state: What changes while learning.
        sampler: Of the actions that it explores with.
        version: Rollouts learnt from, with those that were skipped.
    """

    algorithm_class: ClassVar[Any] = PPO

    def __init__(
        self,
        config: TrainConfig,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        algorithm: Any = None,
    ):
        self.config = config
        self.observation_space = observation_space
        self.action_space = action_space
        rows = config.mini_batch_size or config.batch_size
        pixels = bool(find_images(observation_space, config.network))
        sizes = config.layers(pixels).hidden_sizes
        widest = max(sizes, default=1)
        weights = math.inf if pixels else 2 * (len(sizes) * widest * widest + widest)
        prepare_cpu(rows * weights)
        devices = find_devices(config.device, getattr(config, "num_devices", 1))
        self.device, self.mesh = devices[0], mesh_of(devices)
        if self.mesh is not None:  # "all" is a number now, which has to divide minibatches
            self.config = config = dataclasses.replace(config, num_devices=len(devices))
        self.algorithm: Any = algorithm or self.algorithm_class(
            observation_space, action_space, config, config, config.num_envs
        )
        if self.mesh is not None:
            self.algorithm.mesh = self.mesh
        with jax.default_device(self.device):
            state = self.algorithm.init(config.seed)
        self.state: Any = jax.device_put(state, self.device)
        self.version = 0
        self.sampler = Sampler(self.algorithm, config.num_steps, config.seed, self.device)
        self._predictions = 0

    def act(
        self,
        observations: Tree,
        action_mask: np.ndarray | None = None,
        policy_state: Tree = (),
    ) -> Action:
        """Samples actions for a batch, to explore and to learn from.

        Args:
            observations: `[N, ...]`.
            action_mask: `[N, choices]`, 0 where a choice is not allowed; None: all are.
            policy_state: Of a recurrent policy, as the last action brought it; () for the others.

        Returns:
            The raw actions, to be kept, and those that the environment takes.
        """
        if action_mask is not None:
            action_mask = self._checked_mask(action_mask, observations)
        return self.sampler.act(self.acting, observations, action_mask, policy_state)

    @property
    def acting(self) -> Acting:
        """What it acts with now."""
        return Acting(self.state.params, self.state.observation_statistics)

    def forget_episodes(self) -> None:
        """Takes note that all environments begin new episodes."""
        sums = self.state.reward_sums
        if sums is not None:
            self.state = self.state._replace(reward_sums=jnp.zeros_like(sums))

    def update(self, rollout: Rollout, progress: float = 0.0) -> dict[str, jax.Array]:
        """Learns from a rollout that this policy collected.

        Args:
            rollout: As `RolloutBuffer.finish` gives it.
            progress: Share of the training that is done, in [0, 1], for the schedules.

        Returns:
            Metrics by their logged names, as device scalars.

        Raises:
            ValueError: The rollout was collected by another version of the parameters.
        """
        if rollout.origin.version != self.version:
            raise ValueError(
                f"the rollout was collected by version {rollout.origin.version} of the "
                f"parameters, but this is version {self.version}: an on-policy update needs its own"
            )
        return self._learn(rollout, progress)

    def _learn(self, rollout: Rollout, progress: float) -> dict[str, Any]:
        if self.mesh is None:
            self.state, metrics = self.algorithm.update(self.state, rollout, progress)
        else:  # between updates all is as with one device
            everywhere = on_all(self.mesh, (self.state, rollout))
            state, metrics = self.algorithm.update(*everywhere, progress)
            self.state = on_first(state)
        # The rollout's arrays may be written again once this returns.
        jax.block_until_ready(self.state.params)
        self.version += 1
        return metrics

    def predict(
        self,
        observation: Tree,
        deterministic: bool = True,
        action_mask: np.ndarray | None = None,
    ) -> Tree:
        """Chooses actions to use, not to learn from.

        Args:
            observation: One observation, or a batch `[N, ...]`.
            deterministic: The most probable action; otherwise a sample.
            action_mask: `[choices]` or `[N, choices]`, 0 where a choice is not allowed.

        Returns:
            What the environment takes: one action, or a batch.
        """
        observation = _checked(self.observation_space, observation)
        if action_mask is not None:
            action_mask = self._checked_mask(action_mask, observation)
        self._predictions += not deterministic
        actions = self.algorithm.predict(
            self.state.params,
            self.state.observation_statistics,
            observation,
            np.uint32(self.config.seed),
            np.uint32(self._predictions),
            action_mask,
            deterministic=deterministic,
        )
        return map_tree(np.asarray, actions)

    @functools.cached_property
    def _choices(self) -> tuple[int, Leaf]:
        """Width of an action mask, and the leaf of an observation that tells how many there are."""
        return sum(choice_counts(self.action_space)), leaves(self.observation_space)[0]

    def _checked_mask(self, mask: Any, observations: Tree) -> np.ndarray | None:
        """An action mask, `[choices]` or `[N, choices]`; None where no action is a choice."""
        choices, first = self._choices
        if not choices:
            return None
        for key in first.path:
            observations = observations[key]
        shape = np.shape(observations)
        batch_shape = shape[: len(shape) - len(first.shape)]
        try:
            array = np.asarray(mask, np.bool_)
            told = f"of shape {array.shape}"
        except (TypeError, ValueError):  # rows of different lengths, for instance
            array, told = np.empty(0), "that is no array"
        if array.shape not in ((choices,), (*batch_shape, choices)):
            rows = f" or {(*batch_shape, choices)}" if batch_shape else ""
            raise UserError(
                f"an action mask {told} was given: give one of shape {(choices,)}{rows}, with a "
                f"value for each choice in {self.action_space}"
            )
        return array

    @property
    def left_out(self) -> list[str]:
        """What checkpoints do not hold, in words."""
        return []

    def arrays(self) -> dict[str, dict[str, np.ndarray]]:
        """Groups of arrays for a checkpoint: what acting needs, and what learning on needs."""
        state = self.state
        acting = {"parameters": self.algorithm.policy.named(state.params)}
        if state.observation_statistics is not None:
            acting["normalizer"] = flatten_tree(state.observation_statistics._asdict())
        return {**acting, "training": flatten_tree(self._learning_state())}

    def _learning_state(self) -> dict[str, Any]:
        state = self.state._asdict()
        del state["params"], state["observation_statistics"]
        if "key" in state:
            state["key"] = jax.random.key_data(state["key"])
        state["noise_tables"] = np.int64(self.sampler.next_table)
        return state

    def documents(self) -> dict[str, Any]:
        """What a checkpoint says of the policy in JSON."""
        return {
            "config": self.config.to_dict(),
            "spaces": {
                "observation": space_to_json(self.observation_space),
                "action": space_to_json(self.action_space),
            },
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes over all that a checkpoint holds of the policy.

        Raises:
            CheckpointError: It is of another network, or lacks something.
        """
        arrays, where = checkpoint.arrays, f"the policy in {checkpoint.path}"
        policy = self.algorithm.policy
        named = policy.named(self.state.params)
        # Names hold slashes, which stand for nested trees elsewhere.
        params = policy.ravel(restore_tree(named, arrays.get("parameters", {}), where))
        state = self.state._replace(params=jnp.asarray(params))
        if state.observation_statistics is not None:
            statistics = restore_tree(
                state.observation_statistics._asdict(), arrays.get("normalizer", {}), where
            )
            state = state._replace(
                observation_statistics=type(state.observation_statistics)(**statistics)
            )
        training = arrays.get("training", {})
        if training:  # checkpoints had no counts of what was skipped once
            none = np.zeros((), np.int32)
            training = {"skipped": none, "skipped_in_a_row": none, **training}
        learning = restore_tree(self._learning_state(), training, where)
        self.sampler.next_table = int(learning.pop("noise_tables"))
        if "key" in learning:
            learning["key"] = jax.random.wrap_key_data(learning["key"])
        state = state._replace(**_as_named_tuples(learning, state))
        self.version = int(state.updates) + int(state.skipped)
        self.state = jax.device_put(state, self.device)
        self.sampler.forget()


def _as_named_tuples(values: Mapping[str, Any], template: TrainState) -> dict[str, Any]:
    """Restored leaves in the very containers of the template, as compiled programs expect."""
    return {
        name: jax.tree.unflatten(jax.tree.structure(getattr(template, name)), jax.tree.leaves(tree))
        for name, tree in values.items()
    }


def checkpoint_spaces(checkpoint: Checkpoint) -> tuple[gymnasium.Space, gymnasium.Space]:
    """Observation and action space of the policy in a checkpoint.

    Raises:
        CheckpointError: It does not say.
    """
    spaces = checkpoint.documents.get("spaces")
    if not isinstance(spaces, dict) or not {"observation", "action"} <= spaces.keys():
        raise CheckpointError(f"{checkpoint.path} does not say its policy's spaces")
    return space_from_json(spaces["observation"]), space_from_json(spaces["action"])


def _checked(space: gymnasium.Space, observation: Tree) -> Tree:
    """An observation, or a batch of them, as arrays of the shape that the space says."""
    try:
        if isinstance(space, gymnasium.spaces.Dict):
            return {key: _checked(part, observation[key]) for key, part in space.spaces.items()}
        if isinstance(space, gymnasium.spaces.Tuple):
            pairs = zip(space.spaces, observation, strict=True)
            return tuple([_checked(part, value) for part, value in pairs])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the observation is not nested like {space}: {error!r}") from None
    array, shape = np.asarray(observation), space.shape or ()
    if array.ndim - len(shape) not in (0, 1) or array.shape[array.ndim - len(shape) :] != shape:
        raise UserError(
            f"an observation of shape {array.shape} was given, but the policy takes {shape}, or a "
            f"batch [N{''.join(f', {size}' for size in shape)}]"
        )
    if isinstance(space, gymnasium.spaces.Box) and array.dtype.kind in "iu" and array.itemsize > 4:
        return array.astype(np.float32)  # in 32 bits large ones would be other integers
    return array
