"""The table of metrics and the page made from it."""

import warnings
from pathlib import Path

import pytest

from starling.reporting import metrics
from starling.reporting.metrics import METRICS, UndefinedMetricWarning
from starling.reporting.progress import FUSED_PARTS, PARTS

ROOT = Path(__file__).parents[2]


def test_every_metric_has_a_unit_and_one_sentence():
    for name, (unit, definition) in METRICS.items():
        assert name.count("/") == 1
        assert unit
        assert definition[0].isupper() or definition.startswith(("1 -", "`time/fps`")), name
        assert definition.endswith("."), name
        assert ". " not in definition, name
        assert "|" not in definition, name


def test_the_names_that_users_of_stable_baselines3_know_are_there():
    update = "approx_kl clip_fraction entropy_loss explained_variance policy_gradient_loss"
    update += " value_loss learning_rate grad_norm"
    names = {f"train/{name}" for name in update.split()}
    names |= {"rollout/ep_rew_mean", "rollout/ep_len_mean", "rollout/value_mean", "time/fps"}
    names |= {"time/iterations", "time/total_timesteps", "time/time_elapsed"}
    names |= {"eval/mean_reward", "eval/mean_ep_length", "perf/frames_per_second"}
    names |= {f"perf/{part}_share" for part in {*PARTS, *FUSED_PARTS}}
    assert names <= set(METRICS)


def test_every_metric_is_logged_somewhere():
    files = (ROOT / "src" / "starling").rglob("*.py")
    code = "".join(f.read_text(encoding="utf-8") for f in files if f.name != "metrics.py")
    composed = {f"perf/{part}_share" for part in {*PARTS, *FUSED_PARTS}}
    for name in set(METRICS) - composed:
        last = name.partition("/")[2]
        assert f'"{name}"' in code or f'"{last}"' in code or f"{last}=" in code, name


def test_the_page_in_the_docs_is_up_to_date():
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page == metrics.metrics_markdown(), (
        "run: python -m starling.reporting.metrics > docs/metrics.md"
    )
    assert sum(line.startswith("| `") for line in page.splitlines()) == len(METRICS)


def test_an_undefined_name_warns_once(monkeypatch):
    monkeypatch.setattr(metrics, "_warned", set())
    with pytest.warns(UndefinedMetricWarning, match="'rollout/lenght'"):
        metrics.check_names(["rollout/ep_rew_mean", "rollout/lenght"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.check_names(["rollout/lenght", *METRICS])


def test_an_undefined_name_is_an_error_every_time_where_warnings_are(monkeypatch):
    monkeypatch.setattr(metrics, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UndefinedMetricWarning)
        for _ in range(2):
            with pytest.raises(UndefinedMetricWarning):
                metrics.check_names(["train/los"])
