"""What values the keys of a config may have."""

import dataclasses
import math
from typing import Any

from uniq_jax.spec.sections import (
    EXPORT_FORMATS,
    DataSpec,
    ExportSpec,
    LossSpec,
    PhaseSpec,
    RunSpec,
)


class ConfigError(ValueError):
    """A key of the config is unknown, missing, ill-typed or out of range; the message names it."""


def check(spec: RunSpec) -> None:
    """Raises a ConfigError that names the first key whose value is out of range."""
    _check_finite(spec, "")
    for phase in spec.phases:
        _check_finite(phase, f"{phase.name}.")
    _check_data(spec.data)
    _check_export(spec.export)
    _require(0 <= spec.seed < 2**32, "seed", spec.seed, "in 0..2**32-1")
    _require(spec.log_every_steps >= 1, "log_every_steps", spec.log_every_steps, "at least 1")
    _require(spec.eval_every_epochs > 0, "eval_every_epochs", spec.eval_every_epochs, "above 0")
    _at_least_0(spec, "", "checkpoint_every_steps", "layer_metrics_every_steps", "memory_limit_gib")
    _require(
        set(spec.mesh) == {"data", "model"} and all(n == -1 or n >= 1 for n in spec.mesh.values()),
        "mesh",
        spec.mesh,
        "{'data': n, 'model': m} with -1 or positive numbers",
    )
    for phase in spec.phases:
        _check_accumulation(phase, spec.data.batch_size)
        _check_phase(phase)
        _check_optimizer(phase)
        _check_loss(phase.loss, f"{phase.name}.loss")
        _check_oscillation(phase)


def _require(condition: bool, key: str, value: Any, rule: str) -> None:
    if not condition:
        raise ConfigError(f"config.{key} (={value!r}) must be {rule}")


def _at_least_0(section: Any, prefix: str, *keys: str) -> None:
    for key in keys:
        value = getattr(section, key)
        _require(value >= 0, f"{prefix}{key}", value, "at least 0")


def _check_finite(section: Any, prefix: str) -> None:
    """Checks all numbers of a section and of those in it, but for the phases."""
    for field in dataclasses.fields(section):
        key, value = f"{prefix}{field.name}", getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            _check_finite(value, f"{key}.")
        is_tuple = isinstance(value, tuple)
        entries = {f"{key}[{i}]": v for i, v in enumerate(value)} if is_tuple else {key: value}
        for name, entry in entries.items():
            _require(not isinstance(entry, float) or math.isfinite(entry), name, entry, "finite")


def _check_data(data: DataSpec) -> None:
    for key in ("batch_size", "eval_batch_size"):
        value = getattr(data, key)
        _require(value >= 1, f"data.{key}", value, "at least 1")
    _at_least_0(data, "data.", "pad_pixels", "image_size", "workers")
    _require(
        data.resize_size == 0 or data.resize_size >= data.image_size > 0,
        "data.resize_size",
        data.resize_size,
        f"0, or at least config.data.image_size (={data.image_size}) where that is given",
    )
    if data.augment == "random_resized_crop_flip":
        rule = "above 0 with config.data.augment='random_resized_crop_flip'"
        _require(data.image_size > 0, "data.image_size", data.image_size, rule)
        rule = "'auto' or 'never' with config.data.augment='random_resized_crop_flip'"
        _require(data.in_memory != "always", "data.in_memory", data.in_memory, rule)
    rule = f"as long as config.data.mean (={data.mean!r})"
    _require(len(data.mean) == len(data.std), "data.std", data.std, rule)
    for i, value in enumerate(data.std):
        _require(value > 0, f"data.std[{i}]", value, "above 0")


def _check_export(export: ExportSpec) -> None:
    rule = f"formats of {', '.join(EXPORT_FORMATS)}, separated by commas, or ''"
    is_known = all(name in EXPORT_FORMATS for name in export.names)
    _require(is_known, "export.formats", export.formats, rule)
    _at_least_0(export, "export.", "batch", "sample_images")
    _require(export.check_images >= 1, "export.check_images", export.check_images, "at least 1")


def _check_phase(phase: PhaseSpec) -> None:
    name = phase.name
    _require(phase.total_epochs > 0, f"{name}.total_epochs", phase.total_epochs, "above 0")
    _require(0 <= phase.ema_decay < 1, f"{name}.ema_decay", phase.ema_decay, "in [0, 1)")
    _at_least_0(phase, f"{name}.", "calibration_batches", "batch_norm_batches")
    if phase.method == "n2uq":
        rule = "'layer' for method 'n2uq', whose weights have no learned step"
        key = f"{name}.granularity"
        _require(phase.granularity == "layer", key, phase.granularity, rule)
    learned = phase.method in ("n2uq", "uniq_n2uq")
    for key, largest in (("weight_bits", 8), ("activation_bits", 5 if learned else 8)):
        value = getattr(phase, key)
        if phase.is_float:
            _require(value == 32, f"{name}.{key}", value, "32, as its method is 'float'")
        else:
            rule = f"in 1..{largest} for method {phase.method!r}"
            _require(1 <= value <= largest, f"{name}.{key}", value, rule)


def _check_accumulation(phase: PhaseSpec, batch_size: int) -> None:
    key, value = f"{phase.name}.accumulation_steps", phase.accumulation_steps
    rule = f"a positive divisor of config.data.batch_size (={batch_size})"
    _require(value >= 1 and batch_size % value == 0, key, value, rule)


def _check_optimizer(phase: PhaseSpec) -> None:
    optimizer, prefix = phase.optimizer, f"{phase.name}.optimizer."
    _require(
        0 <= optimizer.warmup_epochs < phase.total_epochs,
        f"{prefix}warmup_epochs",
        optimizer.warmup_epochs,
        f"at least 0 and below total_epochs (={phase.total_epochs})",
    )
    _at_least_0(
        optimizer,
        prefix,
        *("learning_rate", "warmup_learning_rate", "weight_decay", "quantizer_rate_multiplier"),
    )
    _require(0 <= optimizer.momentum < 1, f"{prefix}momentum", optimizer.momentum, "in [0, 1)")
    fraction = optimizer.quantizer_freeze_fraction
    _require(0 <= fraction <= 1, f"{prefix}quantizer_freeze_fraction", fraction, "in [0, 1]")


def _check_oscillation(phase: PhaseSpec) -> None:
    section, key = phase.oscillation, f"{phase.name}.oscillation"
    _require(0 < section.momentum <= 1, f"{key}.momentum", section.momentum, "in (0, 1]")
    for name in ("threshold", "freeze_threshold", "freeze_threshold_start"):
        value = getattr(section, name)
        _require(0 <= value < 1, f"{key}.{name}", value, "in [0, 1)")
    _at_least_0(section, f"{key}.", "damping")
    start, end = section.freeze_threshold_start, section.freeze_threshold
    rule = f"0, or at least freeze_threshold (={end}) where that is above 0"
    _require(start == 0 or start >= end > 0, f"{key}.freeze_threshold_start", start, rule)
    for name in ("measure", "damping", "freeze_threshold"):
        value = getattr(section, name)
        rule = "off in a float phase, whose weights have no levels"
        _require(not (phase.is_float and value), f"{key}.{name}", value, rule)


def _check_loss(loss: LossSpec, key: str) -> None:
    _require(
        0 <= loss.label_smoothing < 1, f"{key}.label_smoothing", loss.label_smoothing, "in [0, 1)"
    )
    _require(loss.mixup_alpha >= 0, f"{key}.mixup_alpha", loss.mixup_alpha, "at least 0")
    _require(
        0 < loss.teacher_weight <= 1, f"{key}.teacher_weight", loss.teacher_weight, "in (0, 1]"
    )
    _require(
        loss.teacher_temperature > 0,
        f"{key}.teacher_temperature",
        loss.teacher_temperature,
        "above 0",
    )
    if loss.teacher:
        rule = f"the name of the network that config.{key}.teacher (={loss.teacher!r}) holds"
        _require(bool(loss.teacher_model), f"{key}.teacher_model", loss.teacher_model, rule)
        rule = "0 where config." + key + ".teacher_weight is 1, as the labels don't count"
        smooths = loss.label_smoothing > 0 and loss.teacher_weight == 1
        _require(not smooths, f"{key}.label_smoothing", loss.label_smoothing, rule)
        return
    alone: dict[str, Any] = {
        "teacher_model": "",
        "teacher_options": {},
        "teacher_weight": 1.0,
        "teacher_temperature": 1.0,
    }
    for field, default in alone.items():
        value = getattr(loss, field)
        rule = f"{default!r} where config.{key}.teacher names no teacher"
        _require(value == default, f"{key}.{field}", value, rule)
