"""What DQN can be told. Imports no JAX, so that the command line stays fast."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from starling.algorithms.update_parameters import UpdateParameters
from starling.ranges import Choice, Range, Ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class DQNParameters(UpdateParameters):
    """Parameters of the replay, the exploration and the update."""

    SEARCH: ClassVar[Ranges] = {
        "lr": Range(5e-5, 5e-3, "log", in_run=True),
        "gamma": Range(0.9, 0.9999, "near_1"),  # not in a run, whose replay has sums with it
        "mini_batch_size": Choice((32, 64, 128, 256)),
        "n_step": Choice((1, 3, 5)),
        "updates_per_transition": Range(0.1, 1.0, "log"),
        "target_update_interval": Range(100, 2000, "log"),
        "epsilon_end": Range(0.01, 0.1, "log"),
        "epsilon_steps": Range(5_000, 100_000, "log"),
    }

    num_steps: int = 16
    mini_batch_size: int = 64
    lr: float = 5e-4
    max_grad_norm: float | None = 10.0
    adam_eps: float = 1e-8

    buffer_size: int = 100_000
    """Transitions that the replay keeps, over all environments; older ones are overwritten."""

    frame_stack: int | None = None
    """Frames S in image observations [S, height, width, ...], newest last, which the replay then
    keeps one by one, in a fraction of the memory. None: it keeps observations as they are."""

    save_replay: bool = True
    """Checkpoints hold the replay, so that a resumed run goes on with the same transitions; each
    takes as much disk as the replay takes memory. Without it, a resumed run fills a new one, also
    where the checkpoint holds one."""

    learning_starts: int = 1000
    """Transitions that come into the replay before it is learnt from."""

    updates_per_transition: float = 0.25
    """Gradient steps for each transition, whatever num_envs is; fractions are carried over."""

    double: bool = True
    """Double DQN: the network that learns chooses the next action, the target network says what
    it is worth. Otherwise the target network does both."""

    dueling: bool = False
    """Q is the sum of a value and of advantages of mean 0, each with a last hidden layer of its
    own."""

    n_step: int = 1
    """Steps whose rewards are summed before the target network says what follows."""

    prioritized: bool = False
    """Transitions are drawn in proportion to their last TD error, not uniformly."""

    priority_alpha: float = 0.6
    """Exponent of the TD error in a priority, in [0, 1]; 0 draws uniformly."""

    priority_beta: float = 0.4
    """Exponent of the weights that correct for drawing by priority, in [0, 1], at the start; it
    rises linearly to 1 at the end of training."""

    loss: Literal["huber", "mse"] = "huber"
    """Of a TD error: its square / 2, from 1 on linear (huber), or its square / 2 throughout."""

    target_update_interval: int | None = 250
    """Gradient steps from one copy of the network to the target network to the next. None: tau
    says how the target network follows."""

    tau: float | None = None
    """Share of the network in the target network's average after each gradient step (Polyak), in
    [0, 1]. None: it is copied every target_update_interval."""

    epsilon_start: float = 1.0
    """Share of random actions at the start, in [0, 1]."""

    epsilon_end: float = 0.05
    """Share of random actions after epsilon_steps, in [0, 1]; of async_dqn the share when sampling
    after training, as each of its environments ends with a share of its own."""

    epsilon_steps: int = 50_000
    """Transitions, over all environments, in which the share of random actions falls linearly
    from epsilon_start to epsilon_end."""
