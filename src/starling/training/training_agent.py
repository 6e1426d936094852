"""An agent with environments to train on, and a run that it leaves behind."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from starling.config import ALGORITHMS, config_from_dict, find_trainer_class, resolve
from starling.config import resume as resume_config
from starling.configs import TrainConfig
from starling.envs.make import make_vec
from starling.envs.vector_env import VectorEnv
from starling.envs.worker_count import usable_cores
from starling.errors import StarlingError, UserError, WorkerError
from starling.reporting.writers import require_wandb
from starling.storage.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from starling.training.agent import Agent, checkpoint_spaces
from starling.training.collector import HostCollector
from starling.training.compilation_cache import keep_compiled_programs
from starling.training.environments import new_envs
from starling.training.evaluation import evaluate_policy
from starling.training.fit import check_fit
from starling.training.result import TrainResult
from starling.training.run_folder import (
    create_run_folder,
    lock_run,
    read_settings,
    versions,
    write_settings,
)
from starling.training.trainer import Callback, Trainer

# Groups in which a NaN would make acting, or learning on, worthless.
_ACTING = ("parameters", "normalizer")
_ALL_ARRAYS = (*_ACTING, "training", "acting")
_LARGE = ("replay",)  # of use to nobody who does not train
# Worker processes of an evaluation, which those of the training stand beside.
_EVALUATION_WORKERS = min(4, usable_cores())

_log = logging.getLogger(__name__)


class TrainingAgent(Agent):
    """What trains on environments: the base of `ParallelPPO`, `AsyncPPO` and `DQN`.

    Args:
        env_name: Gymnasium id, `"module:callable"`, factory, environment, or a
            `gymnasium.vector.VectorEnv`.
        algo: A name in `ALGORITHMS` that this class trains; that of `config_class` if None.
        config: All settings at once, in place of `env_name` and `settings`.
        resume: Run folder to go on with; `settings` may change only how long and how often.
        **settings: Any setting of the configuration (`starling train --help` lists them). Where
            the environment has a preset, that takes the place of the defaults.

    Raises:
        UserError: A setting, or a value of one, cannot be used; the message says how to mend it.

    Attributes:
        config: Every setting, as resolved.
        envs: The environments that it trains on.
        step: Environment steps trained on so far.
        iteration: Rollouts learnt from so far.
        run: The run's folder, once there is one.
    """

    config_class: ClassVar[type[TrainConfig]]
    in_programs: ClassVar[bool] = False
    """Whether compiled environments may be stepped inside a program."""

    run: Path | None = None
    step = iteration = 0
    _envs: VectorEnv | None = None
    _evaluation_envs: VectorEnv | None = None
    _lock: Any = None
    _before: Checkpoint | Trainer | None = None

    def __init__(
        self,
        env_name: Any = None,
        *,
        algo: str | None = None,
        config: TrainConfig | None = None,
        resume: str | Path | None = None,
        **settings: Any,
    ):
        self._source = env_name
        checkpoint = None
        try:
            if resume is not None:
                before = read_settings(resume)
                self.run, self._lock = Path(resume).absolute(), lock_run(resume)
                if config is None:
                    config = resume_config(config_from_dict(before), settings)
                checkpoint = self._before = load_checkpoint(
                    resume, finite=_ALL_ARRAYS, mapped=_LARGE
                )
            elif config is None:
                config = _config_for(env_name, algo or self.config_class.algo, settings)
            assert config is not None
            if self._source is None:
                self._source = config.env
            self.config = config
            self._check_algo()
            keep_compiled_programs()
            envs = self.envs
            if not isinstance(self._source, gymnasium.vector.VectorEnv):
                # Whoever goes on with the run, or scores it, gets the same environments.
                self.config = dataclasses.replace(self.config, backend=envs.backend)
            super().__init__(self.config, envs.single_observation_space, envs.single_action_space)
            if checkpoint is not None:
                self._take(checkpoint)
        except BaseException:
            self.close()
            raise

    def _check_algo(self) -> None:
        algo = self.config.algo
        if algo not in ALGORITHMS:
            return
        trainer = find_trainer_class(algo)
        if not (isinstance(self, trainer) and isinstance(self.config, self.config_class)):
            raise UserError(
                f"algo {algo} is trained by {trainer.__name__}, not {type(self).__name__}"
            )

    @classmethod
    def load(
        cls, path: str | Path, which: str = "latest", device: str = "auto", env_name: Any = None
    ) -> Self:
        """A trained policy, to predict and evaluate with; builds no environment yet.

        Args:
            path: A run folder, or one checkpoint.
            which: "latest" or "best"; means nothing for one checkpoint.
            device: Where the networks compute, which need not be where they were trained.
            env_name: What it is evaluated on, in any form that training takes; by default
                what it was trained on, if that has a name.

        Raises:
            CheckpointError: There is none, or none that can be read.
            UserError: Another class has trained it.
        """
        checkpoint = load_checkpoint(path, which=which, finite=_ACTING, without=_LARGE)
        config = config_from_dict(checkpoint.documents.get("config", {}))
        alone = {"num_devices": 1} if hasattr(config, "num_devices") else {}
        config = dataclasses.replace(config, device=device, **alone)
        trainer = find_trainer_class(config.algo)
        if not (issubclass(trainer, cls) or isinstance(config, cls.config_class)):
            raise UserError(
                f"{path} is a policy of {trainer.__name__}, not {cls.__name__}: use starling.load"
            )
        keep_compiled_programs()
        agent = cls.__new__(trainer if issubclass(trainer, cls) else cls)
        agent._source = config.env if env_name is None else env_name
        Agent.__init__(agent, config, *checkpoint_spaces(checkpoint))
        agent._take(checkpoint)
        return agent

    def _take(self, checkpoint: Checkpoint) -> None:
        self.restore(checkpoint)
        self.step = checkpoint.step
        self.iteration = int(checkpoint.counters.get("iteration", self.version))

    @property
    def envs(self) -> VectorEnv:
        """The environments that it trains on, made when first asked for."""
        if self._envs is None:
            self._envs = self._new_envs(self.config.num_envs, self.config.num_workers)
        return self._envs

    def _new_envs(self, num_envs: int, num_workers: int | None, first: int = 0) -> VectorEnv:
        return new_envs(self._source, self.config, num_envs, num_workers, self.in_programs, first)

    def train(
        self,
        total_timesteps: int | None = None,
        log_interval: int | None = None,
        save_interval: int | None = None,
        callbacks: Callback | Sequence[Callback] = (),
        stop: Callable[[], bool] = lambda: False,
        quiet: bool = False,
    ) -> TrainResult:
        """Trains until `total_timesteps` environment steps were made in all.

        A second call goes on in the same run. Checkpoints, metrics and the result lie in `run`.

        Args:
            total_timesteps: The config's `timesteps` if None; rounded up to whole rollouts.
            log_interval: Iterations between reports; the config's if None.
            save_interval: Iterations between checkpoints; the config's if None.
            callbacks: One or several functions, called after every iteration with an
                `Iteration`; one that returns False stops the run.
            stop: Asked between steps; True stops the run after a save.
            quiet: Show no progress.

        Returns:
            What is written to `result.json`.

        Raises:
            UserError: The agent has trained before and is closed.
            StoppedError: `stop` said so before environments that fail had begun an episode.
        """
        if self.run is not None and self._lock is None:
            raise UserError(
                f"this agent is closed, and another process may have its run now: go on with "
                f"{type(self).__name__}(resume={str(self.run)!r})"
            )
        changes = {
            "timesteps": total_timesteps,
            "log_interval": log_interval,
            "save_interval": save_interval,
        }
        given = {name: value for name, value in changes.items() if value is not None}
        self.config = dataclasses.replace(self.config, **given)
        collector = self.make_collector()
        for actor in getattr(collector, "actors", [self]):
            actor.envs.heed(stop)  # collecting does it later; this is for the first reset
        return self.trainer(collector, callbacks, stop, quiet).train()

    def trainer(
        self,
        collector: Any,
        callbacks: Callback | Sequence[Callback] = (),
        stop: Callable[[], bool] = lambda: False,
        quiet: bool = False,
    ) -> Trainer:
        """Opens the run's folder, and makes what one call of `train` runs; see there."""
        if self.config.wandb_project:
            require_wandb()
        if self.run is None:
            self._open_run()
        assert self.run is not None
        write_settings(self.run, {**self.config.to_dict(), "versions": versions()})
        trainer = Trainer(
            self, collector, self.run, self.config.timesteps, self._before, callbacks, stop, quiet
        )
        self._before = trainer
        return trainer

    def make_collector(self) -> Any:
        """What fills the rollouts of a call of `train`."""
        return HostCollector(self.envs, self.config.num_steps)

    def _open_run(self) -> None:
        config = self.config
        folder = create_run_folder(
            config.log_dir, config.env, config.algo, config.seed, config.run_name
        )
        self.run = folder.absolute()  # an environment may change the current folder
        self._lock = lock_run(self.run)

    def evaluate(
        self,
        episodes: int = 100,
        seed: int = 1,
        deterministic: bool = True,
        stop: Callable[[], bool] = lambda: False,
    ) -> Any:
        """Scores the policy over whole episodes on environments of their own.

        Args:
            episodes: How many to play.
            seed: Of the environments; differs from training with the same number.
            deterministic: Most probable actions; otherwise samples.
            stop: Asked before each step.

        Returns:
            An `EvaluationResult`, or None if `stop` ended it.
        """
        if episodes < 1:
            raise UserError(f"episodes must be at least 1, not {episodes}")
        envs = self._envs_to_evaluate(min(episodes, 16))

        def predict(observations: Any, mask: np.ndarray | None) -> Any:
            return self.predict(observations, deterministic, mask)

        try:
            return evaluate_policy(predict, envs, episodes, seed, stop)
        except StarlingError as error:  # they may be of no use any more
            envs.close()
            self._evaluation_envs = None
            if isinstance(error, WorkerError):  # names an environment, as training's are named
                error.args = (f"in an evaluation: {error}",)
            raise
        finally:
            if envs.faults:
                told = ", ".join(f"{name} {count}" for name, count in envs.faults.items())
                _log.warning("in an evaluation, which numbers environments anew: %s", told)
            self.evaluation_faults.update(envs.faults)
            envs.faults.clear()

    @functools.cached_property
    def evaluation_faults(self) -> Counter[str]:
        """What went wrong so far in evaluations, as `VectorEnv.faults`."""
        return Counter()

    def _envs_to_evaluate(self, num_envs: int) -> VectorEnv:
        envs = self._evaluation_envs
        if envs is not None and envs.num_envs == num_envs:
            return envs
        config = self.config
        source, kwargs = self._source, config.env_kwargs
        if isinstance(source, gymnasium.vector.VectorEnv):
            source, kwargs = _single(source)
        if envs is not None:
            self._evaluation_envs = None
            envs.close()
        in_processes = config.backend == "process"
        envs = make_vec(
            source,
            num_envs,
            backend=config.backend if config.backend in ("envpool", "process") else "serial",
            num_workers=min(num_envs, _EVALUATION_WORKERS) if in_processes else None,
            env_kwargs=kwargs,
            copy=False,
            step_timeout=config.step_timeout if in_processes else None,
            # one that was dropped would never end its episodes
            on_env_error="raise" if config.on_env_error == "raise" else "restart",
            max_restarts=config.max_restarts,
            on_invalid_data=config.on_invalid_data,
        )
        self._evaluation_envs = envs
        check_fit(
            self.config.env,
            (self.observation_space, self.action_space),
            (envs.single_observation_space, envs.single_action_space),
        )
        return envs

    def save(self, path: str | Path) -> Path:
        """Saves a checkpoint folder that `starling.load` reads.

        Args:
            path: Folder to make the checkpoint in.

        Returns:
            The checkpoint's folder.
        """
        counters = {"iteration": self.iteration, "step": self.step}
        return save_checkpoint(path, self.step, self.arrays(), self.documents(), counters)

    def close(self) -> None:
        """Ends the environments; idempotent."""
        for envs in (self._envs, self._evaluation_envs):
            if envs is not None:
                envs.close()
        self._envs = self._evaluation_envs = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _config_for(env: Any, algo: str, settings: dict[str, Any]) -> TrainConfig:
    """The settings for an environment given in any way."""
    if env is None:
        raise UserError('env_name is missing: give a Gymnasium id such as "CartPole-v1"')
    name = env if isinstance(env, str) else _name_of(env)
    if isinstance(env, gymnasium.vector.VectorEnv):
        settings = {"num_envs": env.num_envs, **settings}
    return resolve(algo, {"env": name, **settings})[0]


def _name_of(env: Any) -> str:
    spec = getattr(env, "spec", None)
    if isinstance(spec, EnvSpec):  # that of a wrapper's class is a property
        return spec.id
    return getattr(env, "__qualname__", type(env).__qualname__)


def _single(envs: gymnasium.vector.VectorEnv) -> tuple[str, dict[str, Any]]:
    """Id and arguments of one of the environments in a vector environment.

    Raises:
        UserError: It does not say what they are made from.
    """
    if envs.spec is None:
        raise UserError(
            "evaluation needs environments of its own, and this vector environment has no spec to "
            "make them from: train with an id or a factory"
        )
    of_the_vector = {"num_envs", "vectorization_mode", "vector_kwargs", "wrappers"}
    kwargs = {k: v for k, v in envs.spec.kwargs.items() if k not in of_the_vector}
    return envs.spec.id, kwargs
