"""Runs that are killed and stopped for minutes on end: writes docs/storms.md.

The figures are those that the slow tests named below record; beside the page lies docs/storms.json.
It takes an hour. Tests that fail leave the page as it was.
"""

from __future__ import annotations

import argparse
from typing import Any

from measuring import here, recorded, write_page

CHECKPOINTS, STORMS, SOAK = (
    "tests/faults/test_checkpoint_faults.py",
    "tests/faults/test_storms.py",
    "tests/learning/test_killing_soak.py",
)
Line = dict[str, Any]

INTRODUCTION = """\
# Under fire

<!-- Written by `make bench ARGS="--only storms"` from docs/storms.json. -->

How often runs were killed and stopped by the slow tests behind this table, and what came of it. A
row is here only if its test passed; single faults have [a page of their own](faults.md).

| what | how often | what came of it | test |
| --- | --- | --- | --- |
"""


def measure(quick: bool) -> list[Line]:
    """Runs the tests; the lines that they record."""
    if quick:
        return recorded(SOAK, which="slow", STARLING_SOAK_MINUTES="2")
    return recorded(CHECKPOINTS, STORMS, SOAK, which="slow")


def page(stored: dict[str, Any]) -> str:
    """The table as a page of the documentation."""
    rows = []
    for name, row in ROWS.items():
        if found := [line for line in stored["lines"] if line["name"] == name]:
            rows.append(f"| {' | '.join(row(found))} |\n")
    measured = stored["measured"]
    place = f"{measured['date']}, {measured['cores']} cores, {measured['machine']}"
    return INTRODUCTION + "".join(rows) + f"\nMeasured on {place}.\n"


def _soak(lines: list[Line]) -> list[str]:
    (soak,) = lines
    return [
        "workers of an `AsyncPPO` run on CartPole-v1 killed every 1 to 5 s",
        f"{soak['kills']} in {soak['minutes']:.0f} minutes",
        f"{soak['steps']:,} steps; it scores {soak['score']} of 500 then; in the last three "
        f"quarters its memory changes by {soak['slope']:+.2f} MB a minute; file handles open after "
        f"the first iteration {soak['handles_before']}, at the end {soak['handles_after']}",
        f"`{SOAK}::test_it_learns_while_its_workers_are_killed`",
    ]


def _stopped(lines: list[Line]) -> list[str]:
    return [
        "runs stopped by SIGINT or SIGTERM at any moment, and resumed",
        _by_algorithm(lines),
        "each saved, or nothing was begun; no process left; in the end no step, episode, "
        "evaluation or transition is missing or counted twice",
        f"`{STORMS}::test_stopped_at_random_moments_and_resumed`",
    ]


def _killed(lines: list[Line]) -> list[str]:
    return [
        "runs killed by `kill -9` at any moment, and resumed",
        _by_algorithm(lines),
        "no worker left after 3 s; the newest checkpoint could be loaded each time; all counted "
        "once, as above",
        f"`{STORMS}::test_a_killed_run_leaves_no_worker_and_goes_on`",
    ]


def _by_algorithm(lines: list[Line]) -> str:
    each = ", ".join(f"{line['times']} `{line['algo']}`" for line in lines)
    return f"{sum(line['times'] for line in lines)}: {each}"


def _activities(lines: list[Line]) -> list[str]:
    hit = {name: n for name, n in lines[0].items() if name != "name"}
    by_number = sorted(hit.items(), key=lambda item: -item[1])
    return [
        "what these two met runs at",
        f"{sum(hit.values())}",
        ", ".join(f"{name} {n}" for name, n in by_number),
        f"`{STORMS}::test_the_storms_above_met_runs_at_different_things`",
    ]


def _checkpoints(lines: list[Line]) -> list[str]:
    return [
        "processes killed by `kill -9` while they save checkpoints",
        f"{lines[0]['kills']}",
        "after each the newest checkpoint that was finished could be loaded, and was whole",
        f"`{CHECKPOINTS}::test_killed_at_random_moments`",
    ]


def _replays(lines: list[Line]) -> list[str]:
    return [
        "the same of a replay, which goes on from it",
        f"{lines[0]['kills']}",
        "after each it held every transition once",
        f"`{CHECKPOINTS}::test_a_replay_that_is_killed_at_random_moments_goes_on`",
    ]


ROWS = {
    "soak": _soak,
    "stopped": _stopped,
    "killed": _killed,
    "activities": _activities,
    "checkpoints": _checkpoints,
    "replays": _replays,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two minutes; writes to build/")
    options = parser.parse_args()
    stored = {"measured": here(), "lines": measure(options.quick)}
    write_page("storms", stored, page, options.quick)


if __name__ == "__main__":
    main()
