"""Which trials of a search go on, and with what: Ray Tune's schedulers, by name."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from starling.ranges import Choice, Range, Space
from starling.reporting.writers import METRICS_FILE
from starling.training.trials import REPORTS, RETURN, STEP, reports


def asha(timesteps: int, plan: Mapping[str, Any]) -> Any:
    """Successive halving, asynchronous (Li et al. 2020): the best third goes on at 1/9 and 1/3."""
    from ray.tune.schedulers import ASHAScheduler

    class Scheduler(ASHAScheduler):
        """Takes note of what trials reported before the search was gone on with: Ray does not."""

        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            super().on_trial_add(tune_controller, trial)
            run = Path(trial.storage.storage_fs_path, str(trial))
            for step, score in reports(run / METRICS_FILE):
                self.on_trial_result(tune_controller, trial, {STEP: step, RETURN: score})

    return Scheduler(
        time_attr=STEP, max_t=timesteps, grace_period=max(1, timesteps // 9), reduction_factor=3
    )


def pbt(timesteps: int, plan: Mapping[str, Any]) -> Any:
    """Population based training (Jaderberg et al. 2017), asynchronous.

    Whenever a trial of the worst quarter reports, it goes on from a copy of one of the best quarter
    with settings next to that one's. (In step with each other, trials would wait for ever for one
    that failed.)
    """
    from ray.tune.schedulers import PopulationBasedTraining

    space: Space = {
        name: Choice(**content) if "values" in content else Range(**content)
        for name, content in plan["space"].items()
    }
    return PopulationBasedTraining(
        time_attr=STEP,
        # Every report counts, also where whole iterations fall short of a generation.
        perturbation_interval=max(1, timesteps // REPORTS["pbt"] // 2),
        custom_explore_fn=functools.partial(explore, space, random.Random(plan["given"]["seed"])),
        log_config=False,
    )


def explore(space: Space, source: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    """Settings next to those of a trial, where a run may go on with others."""
    settings = dict(config["settings"])
    for name, domain in space.items():
        if domain.in_run:
            settings[name] = domain.move(settings[name], source)
    return {**config, "settings": settings}


SCHEDULERS: dict[str, Callable[[int, Mapping[str, Any]], Any]] = {"asha": asha, "pbt": pbt}
