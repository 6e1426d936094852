"""Configuration dataclasses as options: their documentation, and values from text.

The command line, the reference page and the error messages all read the dataclasses through here.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import math
import numbers
import textwrap
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from starling.errors import UserError

# What Stable-Baselines3, CleanRL, RLlib, Sample Factory, rsl_rl and Tianshou call it.
OTHER_NAMES = {
    "activation_fn": "activation",
    "actor_hidden_dims": "hidden_sizes",
    "advantage_normalization": "normalize_advantage",
    "anneal_lr": "lr_schedule",
    "batch_size": "mini_batch_size",
    "checkpoint_freq": "save_interval",
    "clip_coef": "clip_param",
    "clip_range": "clip_param",
    "clip_range_vf": "value_clip",
    "clip_vloss": "value_clip",
    "critic_hidden_dims": "hidden_sizes",
    "cuda": "device",
    "desired_kl": "target_kl",
    "discount": "gamma",
    "end_e": "epsilon_end",
    "encoder_conv_architecture": "network",
    "ent_coef": "entropy_coef",
    "entropy_coeff": "entropy_coef",
    "entropy_loss_coef": "entropy_coef",
    "env_id": "env",
    "env_name": "env",
    "eps_clip": "clip_param",
    "eval_freq": "eval_interval",
    "eval_num_episodes": "eval_episodes",
    "exp_name": "run_name",
    "experiment": "run_name",
    "experiment_name": "run_name",
    "exploration_final_eps": "epsilon_end",
    "exploration_initial_eps": "epsilon_start",
    "exploration_fraction": "epsilon_steps",
    "exploration_loss_coeff": "entropy_coef",
    "fcnet_activation": "activation",
    "fcnet_hiddens": "hidden_sizes",
    "gradient_clip": "max_grad_norm",
    "grad_clip": "max_grad_norm",
    "gradient_steps": "updates_per_transition",
    "horizon": "num_steps",
    "k_epochs": "epochs",
    "lam": "gae_lambda",
    "lambda": "gae_lambda",
    "lambda_": "gae_lambda",
    "learning_rate": "lr",
    "log_std": "log_std_init",
    "lr_anneal": "lr_schedule",
    "minibatch_size": "mini_batch_size",
    "n_envs": "num_envs",
    "n_epochs": "epochs",
    "n_eval_episodes": "eval_episodes",
    "n_steps": "num_steps",
    "n_timesteps": "timesteps",
    "n_workers": "num_workers",
    "net_arch": "hidden_sizes",
    "nonlinearity": "activation",
    "norm_adv": "normalize_advantage",
    "norm_obs": "normalize_observations",
    "norm_reward": "normalize_rewards",
    "normalize_input": "normalize_observations",
    "normalize_returns": "normalize_rewards",
    "num_env_runners": "num_workers",
    "num_envs_per_worker": "num_envs",
    "num_epochs": "epochs",
    "num_learning_epochs": "epochs",
    "num_sgd_iter": "epochs",
    "num_steps_per_env": "num_steps",
    "policy": "network",
    "policy_clip": "clip_param",
    "ppo_clip_ratio": "clip_param",
    "ppo_clip_value": "value_clip",
    "repeat_per_collect": "epochs",
    "replay_size": "buffer_size",
    "rew_norm": "normalize_rewards",
    "rollout": "num_steps",
    "rollout_fragment_length": "num_steps",
    "save_every": "save_interval",
    "save_freq": "save_interval",
    "sgd_minibatch_size": "mini_batch_size",
    "start_e": "epsilon_start",
    "step_per_collect": "num_steps",
    "stop": "stop_iterations",
    "target_network_frequency": "target_update_interval",
    "tensorboard_log": "log_dir",
    "total_steps": "timesteps",
    "total_timesteps": "timesteps",
    "train_dir": "log_dir",
    "train_for_env_steps": "timesteps",
    "train_freq": "updates_per_transition",
    "train_frequency": "updates_per_transition",
    "training_num": "num_envs",
    "update_epochs": "epochs",
    "value_loss_coef": "value_coef",
    "value_loss_coeff": "value_coef",
    "vec_env_cls": "backend",
    "vf_clip_param": "value_clip",
    "vf_coef": "value_coef",
    "vf_loss_coeff": "value_coef",
    "wandb_project_name": "wandb_project",
}


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of a configuration dataclass."""

    name: str
    kind: str  # "int", "float", "bool", "str", "ints" or "dict"
    choices: tuple[str, ...]  # words that may be given, also where a number may
    nullable: bool
    default: Any  # dataclasses.MISSING: the value must be given
    doc: str
    group: type  # the class that introduces the field

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is dataclasses.MISSING

    def describe(self) -> str:
        """What a value must be, in words."""
        kinds = {
            "int": "a whole number",
            "float": "a number",
            "bool": "True or False",
            "str": "a text",
            "ints": "whole numbers such as 64 64",
            "dict": 'a JSON object such as {"key": 1}',
        }
        words = list(self.choices)
        if self.kind != "str" or not words:
            words.insert(0, kinds[self.kind])
        return " or ".join([*words, *["none"] * self.nullable])


@functools.cache
def options(config_class: type) -> Mapping[str, Option]:
    """Return the fields of a configuration dataclass by name, in the order of its definition."""
    hints = typing.get_type_hints(config_class)
    docs = field_docs(config_class)
    found = {}
    for field in dataclasses.fields(config_class):
        kind, choices, nullable = _read_hint(hints[field.name])
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        group = [c for c in config_class.__mro__ if field.name in inspect.get_annotations(c)]
        found[field.name] = Option(
            field.name, kind, choices, nullable, default, docs.get(field.name, ""), group[-1]
        )
    return types.MappingProxyType(found)


def field_docs(config_class: type) -> dict[str, str]:
    """Return the docstring beneath each field of a dataclass, joined to one line, by field name."""
    docs: dict[str, str] = {}
    for cls in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        body = typing.cast(ast.ClassDef, definition).body
        for field, doc in itertools.pairwise(body):
            match field, doc:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    docs[name] = " ".join(text.split())
    return docs


def parse(option: Option, text: str | list[str]) -> Any:
    """Turn what stands on a command line into a value.

    Args:
        option: The option that the text was given for.
        text: One word, or several for an option of several numbers.

    Raises:
        UserError: The text is no value of the option.
    """
    words = [text] if isinstance(text, str) else text
    joined = " ".join(words)
    if _means_none(option, joined):
        return None
    if joined in option.choices:
        return joined
    try:
        match option.kind:
            case "int":
                value: Any = _whole_number(joined)
            case "float":
                value = float(joined)
            case "bool":
                value = {"true": True, "false": False}[joined.lower()]
            case "ints":
                value = tuple(
                    _whole_number(w) for w in joined.strip("[]()").replace(",", " ").split()
                )
            case "dict":
                value = json.loads(joined)
            case _:
                value = joined
    except (ValueError, KeyError):
        raise _wrong_value(option, joined) from None
    return convert(option, value)


def _means_none(option: Option, value: Any) -> bool:
    """Whether a word stands for None: the command line and TOML have no other way to say it."""
    return option.nullable and isinstance(value, str) and value.lower() == "none"


def convert(option: Option, value: Any) -> Any:
    """Return a value from Python code, or a file, in the type of the option.

    Raises:
        UserError: The value is of another type, not finite, or none of the choices.
    """
    if value is None or _means_none(option, value):
        if option.nullable:
            return None
        raise _wrong_value(option, value)
    if isinstance(value, str) and value in option.choices:
        return value
    match option.kind:
        case "int" if _is_number(value) and value == int(value):
            return int(value)
        case "float" if _is_number(value):
            return float(value)
        case "bool" if isinstance(value, bool):
            return value
        case "ints" if isinstance(value, Iterable) and not isinstance(value, str):
            sizes = tuple(value)
            if all(isinstance(size, numbers.Integral) for size in sizes):
                return tuple(int(size) for size in sizes)
        case "dict" if isinstance(value, Mapping):
            return dict(value)
        case "str" if isinstance(value, str):
            if not option.choices:
                return value
            hint = did_you_mean(value, option.choices)
            raise UserError(f"unknown {option.name} {value!r}: {hint}")
    raise _wrong_value(option, value)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return words that name the known names nearest to a mistyped one, or all where none is near.

    Ends in no full stop, so that a sentence can go on.
    """
    names = list(known)
    if near := _nearest(name, names):
        return f"did you mean {' or '.join(near)}?"
    return "there are " + (", ".join(names) or "none")


def _nearest(name: str, known: Iterable[str]) -> list[str]:
    lower = {candidate.lower(): candidate for candidate in known}
    return [lower[match] for match in difflib.get_close_matches(name.lower(), lower)]


def unknown_option(
    name: str, known: Iterable[str], prefix: str = "", command: str = "starling train"
) -> UserError:
    """Return the error for an option that there is not.

    Args:
        name: The option as given, without a prefix.
        known: The options that there are.
        prefix: What stands before an option where the user wrote it: "--" on a command line.
        command: The command whose help lists them all.
    """
    known, spelt = list(known), name.replace("-", "_")
    if (ours := OTHER_NAMES.get(spelt.lower())) in known:
        hint = f"Starling calls it {prefix}{ours}"
    elif near := _nearest(spelt, known):
        hint = f"did you mean {' or '.join(prefix + match for match in near)}?"
    else:
        hint = f"{command} --help lists them all"
    return UserError(f"unknown option {prefix}{name}: {hint}")


def markdown_reference(config_class: type, without: Collection[str] = ()) -> str:
    """Return Markdown tables of the options of a configuration class, one for each group.

    Args:
        config_class: Whose options.
        without: Names of options to leave out.
    """
    lines: list[str] = []
    group: type | None = None
    for option in options(config_class).values():
        if option.name in without:
            continue
        if option.group is not group:
            group = option.group
            lines += [
                "",
                f"## {group_title(group)}",
                "",
                inspect.cleandoc(group.__doc__ or ""),
                "",
            ]
            lines += ["| option | value | default | meaning |", "| --- | --- | --- | --- |"]
        default = "required" if option.required else f"`{show_default(option)}`"
        cells = [f"`{option.name}`", option.describe(), default, option.doc]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines[1:]) + "\n" if lines else ""


def group_title(group: type) -> str:
    """Return the heading of a group of options: the first word of the class name."""
    return group.__name__.removesuffix("Parameters").removesuffix("Config")


def show_default(option: Option) -> str:
    """Return an option's default as a user would write it."""
    default = option.default
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    if isinstance(default, dict):
        return json.dumps(default)
    if isinstance(default, int) and not isinstance(default, bool) and default >= 10_000:
        return f"{default:_}"
    return "none" if default is None else str(default)


def _read_hint(hint: Any) -> tuple[str, tuple[str, ...], bool]:
    """Return the kind, the choices and whether None is allowed, of a field's type."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        inner = [_read_hint(argument) for argument in arguments if argument is not type(None)]
        # A number, or one of the words that may stand for one.
        kind = next((kind for kind, *_ in inner if kind != "str"), "str")
        choices = tuple(word for _, words, _ in inner for word in words)
        return kind, choices, type(None) in arguments
    if typing.get_origin(hint) is typing.Literal:
        return "str", arguments, False
    if typing.get_origin(hint) is tuple:
        return "ints", (), False
    if typing.get_origin(hint) is dict:
        return "dict", (), False
    return hint.__name__, (), False


def _is_number(value: Any) -> bool:
    """Whether a value is a finite real number, of Python or NumPy."""
    return (
        isinstance(value, numbers.Real)
        and not isinstance(value, bool)
        and math.isfinite(float(value))
    )


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)  # 1e6 is a whole number, too
        if not number.is_integer():
            raise
        return int(number)


def _wrong_value(option: Option, value: Any) -> UserError:
    shown = value if isinstance(value, str) else repr(value)
    return UserError(f"{option.name} must be {option.describe()}, not {shown}")
