"""What config files share, and the way from a ConfigDict to a typed, validated spec.

Config files build a `ConfigDict` from `base()` and `phase()`, which hold every key with its
default. `run_spec` turns it into frozen dataclasses, and is the only reader of ConfigDicts.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import ml_collections

from uniq_jax.spec import ConfigError, PhaseSpec, RunSpec, check


def base() -> ml_collections.ConfigDict:
    """Every key that is not a phase's, with its default. `phases` must be filled."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "data": {
                "name": "digits",
                "data_dir": "",
                "image_size": 0,
                "resize_size": 0,
                "in_memory": "auto",
                "workers": 0,
                "on_broken_image": "error",
                "train_split": "train",
                "test_split": "test",
                "batch_size": 128,
                "eval_batch_size": 256,
                "augment": "none",
                "pad_pixels": 4,
                "mean": (),
                "std": (),
            },
            "model": {
                "name": "resnet20",
                "options": {},
                "dtype": "float32",
                "param_dtype": "float32",
                "remat": "none",
            },
            "phases": (),
            "export": {
                "formats": "packed",
                "exact": False,
                "batch": 0,
                "check_images": 1000,
                "sample_images": 0,
            },
            "init_from": "",
            "mesh": {"data": -1, "model": 1},
            "memory_limit_gib": 0.0,
            "log_every_steps": 10,
            "eval_every_epochs": 1.0,
            "checkpoint_every_steps": 200,
            "layer_metrics_every_steps": 500,
            "tensorboard": True,
        }
    )


def phase(method: str = "float", **values: Any) -> ml_collections.ConfigDict:
    """Every key of a phase with its default, overridden by `values`.

    Args:
      method: of the phase.
      **values: of keys; the sections `optimizer`, `loss` and `oscillation` are merged.

    Raises:
      ConfigError: if a value's key is unknown.
    """
    section: Any = ml_collections.ConfigDict(
        {
            "method": method,
            "weight_bits": 32,
            "activation_bits": 32,
            "granularity": "layer",
            "quantize_shortcut": True,
            "calibration_batches": 0 if method == "float" else 10,
            "total_epochs": 1.0,
            "accumulation_steps": 1,
            "batch_norm_batches": 0,
            "ema_decay": 0.0,
            "optimizer": {
                "name": "sgd",
                "learning_rate": 0.1,
                "schedule": "cosine",
                "warmup_epochs": 0.0,
                "warmup_learning_rate": 0.0,
                "warmup_shape": "linear",
                "momentum": 0.9,
                "weight_decay": 5e-4,
                "quantizer_rate_multiplier": 1.0,
                "quantizer_freeze_fraction": 0.0,
            },
            "loss": {
                "label_smoothing": 0.0,
                "mixup_alpha": 0.0,
                "teacher": "",
                "teacher_model": "",
                "teacher_options": {},
                "teacher_weight": 1.0,
                "teacher_temperature": 1.0,
            },
            "oscillation": {
                "measure": False,
                "momentum": 0.01,
                "threshold": 0.005,
                "damping": 0.0,
                "freeze_threshold": 0.0,
                "freeze_threshold_start": 0.0,
            },
        }
    )
    optimizer, loss = values.pop("optimizer", {}), values.pop("loss", {})
    oscillation = values.pop("oscillation", {})
    for target, given, prefix in (
        (section, values, "phase"),
        (section.optimizer, optimizer, "phase.optimizer"),
        (section.loss, loss, "phase.loss"),
        (section.oscillation, oscillation, "phase.oscillation"),
    ):
        for key, value in given.items():
            if key not in target:
                raise ConfigError(_unknown(prefix, key, list(target)))
            with target.ignore_type():
                target[key] = value
    return section


def parse_arg(arg: str | None, **defaults: bool | int | float | str) -> ml_collections.ConfigDict:
    """Parses what follows the colon of `--config=FILE.py:ARG`, as in "bits=1,method=n2uq".

    Args:
      arg: comma-separated `key=value` pairs; a bare `key` sets a boolean. None or "" for defaults.
      **defaults: the keys there are; a value takes the type of its default.

    Raises:
      ConfigError: if a key is unknown, or a value not of its type.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, given, text = item.partition("=")
        if key not in defaults:
            raise ConfigError(_unknown("config argument", key, list(defaults)))
        kind = type(defaults[key])
        if kind is not bool and not given:
            raise ConfigError(f"config argument {key} must have a value, as in {key}=…")
        try:
            if kind is bool:
                values[key] = {"true": True, "1": True, "false": False, "0": False}[
                    text.lower() if given else "true"
                ]
            else:
                values[key] = kind(text)
        except (KeyError, ValueError):
            raise ConfigError(
                f"config argument {key} (={text!r}) must be of type {kind.__name__}"
            ) from None
    return ml_collections.ConfigDict(values)


def run_spec(config: ml_collections.ConfigDict) -> RunSpec:
    """Turns a config into typed sections.

    Raises:
      ConfigError: if a key is unknown (the message gives the nearest known one), missing, of
        another type than its field, or out of range.
    """
    values = config.to_dict()
    names = values.get("phases", ())
    if not isinstance(names, tuple | list) or not names or len(set(names)) != len(names):
        raise ConfigError(f"config.phases (={names!r}) must be a tuple of different phase names")
    phases = []
    for name in names:
        if name not in values:
            raise ConfigError(
                f"config.phases names {name!r}, but there is no section config.{name}"
            )
        phases.append(_section(PhaseSpec, values.pop(name), f"config.{name}", name=name))
    values.pop("phases")
    # A phase may be left out on the command line: its section stays in the file.
    for name in [n for n, v in values.items() if isinstance(v, Mapping) and "method" in v]:
        _section(PhaseSpec, values.pop(name), f"config.{name}", name=name)
    spec = _section(RunSpec, values, "config", phases=tuple(phases))
    check(spec)
    return spec


def _section(cls: type, values: Any, prefix: str, **given: Any) -> Any:
    """Builds the dataclass `cls` from a dict, naming the key in every complaint."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix} (={values!r}) must be a section with keys")
    fields = {f.name: f.type for f in dataclasses.fields(cls) if f.name not in given}
    for key in values:
        if key not in fields:
            raise ConfigError(_unknown(prefix, key, list(fields)))
    for key in fields:
        if key not in values:
            raise ConfigError(f"{prefix}.{key} is missing")
    typed = {key: _typed(values[key], kind, f"{prefix}.{key}") for key, kind in fields.items()}
    return cls(**typed, **given)


def _typed(value: Any, kind: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        return _section(kind, value, key)
    if origin is Literal:
        if value in arguments:
            return value
        close = difflib.get_close_matches(str(value), arguments, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        allowed = ", ".join(map(repr, arguments))
        raise ConfigError(f"{key} (={value!r}) must be one of {allowed}{hint}")
    if origin is tuple and isinstance(value, tuple | list):
        return tuple(_typed(v, arguments[0], f"{key}[{i}]") for i, v in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {k: _typed(v, arguments[1], f"{key}.{k}") for k, v in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = origin or kind
    if isinstance(value, plain) and (plain is bool or not isinstance(value, bool)):
        return value
    name = plain.__name__ if isinstance(plain, type | types.GenericAlias) else str(plain)
    raise ConfigError(f"{key} (={value!r}) must be of type {name}, not {type(value).__name__}")


def _unknown(prefix: str, key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(sorted(known))}"
    joint = " " if " " in prefix else "."
    return f"{prefix}{joint}{key} is no known key; {hint}"
