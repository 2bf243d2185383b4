"""Numbers of a config that no run can use: what is not finite, and deviations that divide by 0."""

import re

import pytest

from uniq_jax import config as c
from uniq_jax.spec import ConfigError


def digits():
    config = c.base()
    config.phases = ("quantized",)
    config.quantized = c.phase("uniq", weight_bits=2, activation_bits=2)
    config.data.mean, config.data.std = (0.5, 0.5), (0.25, 0.25)
    return config


def float_keys(section, prefix=""):
    """All keys of a config whose value is a float, or holds one."""
    found = []
    for key, value in section.items():
        if hasattr(value, "items"):
            found += float_keys(value, f"{prefix}{key}.")
        elif isinstance(value, float) or key in ("mean", "std"):
            found.append(prefix + key)
    return found


FLOATS = float_keys(digits())


def test_every_section_with_floats_is_seen():
    assert {"eval_every_epochs", "data.std", "quantized.total_epochs"} < set(FLOATS)
    sections = {key.rpartition(".")[0] for key in FLOATS}
    inner = {f"quantized.{name}" for name in ("optimizer", "loss", "oscillation")}
    assert sections == {"", "data", "quantized", *inner}


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("key", FLOATS)
def test_numbers_are_finite(key, value):
    config = digits()
    *names, last = key.split(".")
    section = config
    for name in names:
        section = section[name]
    is_tuple = isinstance(section[last], tuple)
    section[last] = (0.5, value) if is_tuple else value
    named = re.escape(f"config.{key}{'[1]' if is_tuple else ''}")
    with pytest.raises(ConfigError, match=rf"^{named} \(={value}\) must be finite$"):
        c.run_spec(config)


@pytest.mark.parametrize("value", [0.0, -0.25])
def test_deviations_are_above_0(value):
    config = digits()
    assert c.run_spec(config).data.std == (0.25, 0.25)
    config.data.std = (0.25, value)
    message = rf"^config\.data\.std\[1\] \(={value}\) must be above 0$"
    with pytest.raises(ConfigError, match=message):
        c.run_spec(config)
