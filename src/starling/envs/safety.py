"""What a vector environment is to do about faults, and what each backend can do."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from starling.errors import UserError

OnEnvError = Literal["raise", "restart", "drop"]
OnInvalidData = Literal["raise", "replace", "truncate", "off"]


@dataclasses.dataclass(frozen=True)
class Safety:
    """What to do about faults, and how to number environments in what is said of them.

    Attributes:
        on_env_error: This and the following as for `make_vec`.
        max_restarts: See there.
        worker_max_rss: See there.
        on_invalid_data: See there.
        first_env: See there.
    """

    on_env_error: OnEnvError = "raise"
    max_restarts: int = 20
    worker_max_rss: float | None = None
    on_invalid_data: OnInvalidData = "raise"
    first_env: int = 0

    def __post_init__(self):
        for name, kinds in (("on_env_error", OnEnvError), ("on_invalid_data", OnInvalidData)):
            value = getattr(self, name)
            if value not in get_args(kinds):
                raise UserError(f"{name} is {value!r}; it can be {', '.join(get_args(kinds))}")
        if self.max_restarts < 0:
            raise UserError(f"max_restarts is {self.max_restarts}; it must be at least 0")
        if self.worker_max_rss is not None and not self.worker_max_rss > 0:
            raise UserError(f"worker_max_rss is {self.worker_max_rss}; give megabytes above 0")

    @property
    def recovers(self) -> bool:
        """Whether single environments must be begun anew, which not every backend can do."""
        return self.on_env_error != "raise" or self.on_invalid_data == "truncate"

    def require_what_it_takes(self, same_step: bool, episode_seeds: bool) -> None:
        """Refuses what does not go with an autoreset mode, or with being restored."""
        if self.on_env_error == "drop" and episode_seeds:
            raise UserError(
                "on_env_error drop does not go with episode_seeds (exact_resume), since what was "
                "dropped cannot be brought back: use restart, or leave one of them out"
            )
        if self.recovers and not same_step:
            raise UserError(
                "on_env_error restart or drop, and on_invalid_data truncate, need autoreset_mode "
                "SAME_STEP; leave one of them out"
            )

    def require_process(self, which: str, instead: str = "use backend process") -> None:
        """Refuses a limit of memory where there are no worker processes.

        Args:
            which: Whose environments these are, for the message.
            instead: What to do.
        """
        if self.worker_max_rss is not None:
            raise UserError(
                f"worker_max_rss needs worker processes, which {which} has not: {instead}, or "
                "leave it out"
            )

    def require_no_recovery(
        self, which: str, instead: str = "use backend process, thread or serial"
    ) -> None:
        """Refuses what takes environments that can be begun anew one by one; see above."""
        self.require_process(which, instead)
        if self.recovers:
            name = "on_invalid_data" if self.on_env_error == "raise" else "on_env_error"
            raise UserError(
                f"{name} {getattr(self, name)} cannot be had with {which}, whose environments "
                f"cannot be begun anew one by one: {instead}, or leave it out"
            )

    def require_no_replacing(self, backend: str) -> None:
        """Refuses to have values replaced where nobody looks at them step by step."""
        if self.on_invalid_data == "replace":
            raise UserError(
                f"on_invalid_data replace cannot be had with backend {backend}, whose steps are "
                "made inside a program: use backend process, thread, serial or envpool"
            )
