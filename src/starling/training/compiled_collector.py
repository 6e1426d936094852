"""Fills rollouts from compiled environments: policy and environments step in one program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from starling.algorithms.acting import Acting
from starling.algorithms.ppo import PPO
from starling.envs.compiled import CompiledEnv
from starling.errors import UserError
from starling.storage.rollout import Origin, Rollout

Array = jax.Array
Tree = Any


class Position(NamedTuple):
    """Where N environments stand between two rollouts.

    Attributes:
        env_state: Of the environments, as they made it.
        observations: `[N, ...]`, what the next actions will be chosen for.
        action_mask: `[N, choices]`, for these actions; None without masks.
        policy_state: `[N, ...]`, of a recurrent policy; () for the others.
    """

    env_state: Tree
    observations: Tree
    action_mask: Array | None = None
    policy_state: Tree = ()


def scan_rollout(
    env: CompiledEnv,
    algorithm: PPO,
    num_steps: int,
    acting: Acting,
    noise: Tree,
    position: Position,
) -> tuple[Position, Rollout]:
    """Collects one rollout, as a part of a compiled program.

    Args:
        env: The environments.
        algorithm: Whose policy acts.
        num_steps: T, steps in the rollout.
        acting: What its policy acts with.
        noise: `[T, N, ...]`, that the actions are sampled with.
        position: Where the environments stand.

    Returns:
        Where they stand afterwards, and the rollout. Its final observations are those of all
        steps, with the index of those that were truncated; both are None where the environments
        reset one step later, since `observations[t + 1]` is what step t truly led to then.
    """

    def step(at: Position, t: Array) -> tuple[Position, tuple]:
        raw, action, policy_state, outputs = algorithm.act_and_keep(
            acting, at.observations, noise, t, at.action_mask, at.policy_state
        )
        env_state, made = env.step(at.env_state, raw if action is None else action)
        after = Position(env_state, made.observation, made.action_mask, policy_state)
        return after, (raw, at.action_mask, made, outputs)

    after, (actions, masks, made, outputs) = jax.lax.scan(
        step, position, jnp.arange(num_steps, dtype=jnp.uint32)
    )
    observations = jax.tree.map(
        lambda first, rest: jnp.concatenate([first[None], rest]),
        position.observations,
        made.observation,
    )
    finals, index = made.final_observation, None
    if finals is not None:
        rows = num_steps * env.num_envs
        finals = jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), finals)
        cut = (made.truncated & ~made.terminated).reshape(-1)
        index = jnp.where(cut, jnp.arange(rows), rows).astype(jnp.int32)
    return after, Rollout(
        observations,
        actions,
        made.reward,
        made.terminated,
        made.truncated,
        finals,
        index,
        made.valid,
        masks,
        position.policy_state,
        Origin(),
        outputs=outputs,
    )


class CompiledCollector:
    """Steps compiled environments and the policy in one program, T steps at a time.

    Takes the place of `HostCollector` where the environments have `compiled`; for the same
    environments, seed and parameters it collects the same rollouts.

    Args:
        envs: The vector environment, whose `compiled` is stepped.
        num_steps: T, steps in a rollout.
        algorithm: Whose policy acts.
        device: Where all of it runs.

    Attributes:
        position: Where the environments stand.
        sequence: Number of the next rollout.
        activity: What a trainer that waits for a rollout is doing.
    """

    activity = "collect"

    def __init__(self, envs: Any, num_steps: int, algorithm: PPO, device: Any):
        self.envs, self.env = envs, cast(CompiledEnv, envs.compiled)
        self.num_steps, self.algorithm, self.device = num_steps, algorithm, device
        self.sequence = 0
        self.position: Position | None = None
        self._scan = jax.jit(self._rollout)

    def reset(self, seed: int | Sequence[int] | None) -> None:
        """Begins new episodes everywhere."""
        state, observations = self.envs.start(seed)
        position = Position(state, observations, self.env.action_mask(state))
        self.position = jax.device_put(position, self.device)

    def restore(self, states: list[dict[str, Any]]) -> None:
        """Refuses: the state of compiled environments is not kept in checkpoints.

        Raises:
            UserError: Always.
        """
        raise UserError(
            "compiled environments cannot be brought back to where they were: leave out "
            "exact_resume, or use backend serial, thread or process"
        )

    def _rollout(self, acting: Acting, noise: Tree, position: Position) -> tuple[Position, Rollout]:
        return scan_rollout(self.env, self.algorithm, self.num_steps, acting, noise, position)

    def collect(self, policy: Any, stop: Callable[[], bool]) -> Rollout | None:
        """Collects one rollout.

        Args:
            policy: Chooses the actions: an agent, or an actor's share of one.
            stop: Asked before the first step.

        Returns:
            The rollout, as arrays on the device; None if `stop` said so.
        """
        if stop():
            return None
        noise = policy.sampler.new_table(self.env.num_envs)
        policy.sampler.forget()
        self.position, rollout = self._scan(policy.acting, noise, self.position)
        rollout = rollout._replace(origin=Origin(policy.version, 0, self.sequence))
        self.sequence += 1
        return rollout
