"""Configs: every file loads, and what is wrong is named."""

import importlib.util
import json
import pathlib

import pytest

from uniq_jax import config as c
from uniq_jax.spec import ConfigError, RunSpec, differences, to_json

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def load(path, arg=None):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def digits():
    config = c.base()
    config.phases = ("quantized",)
    config.quantized = c.phase("uniq", weight_bits=2, activation_bits=2)
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_is_valid_and_documented(path):
    spec = c.run_spec(load(path))
    assert isinstance(spec, RunSpec)
    source = path.read_text()
    assert source.startswith('"""')
    assert "python -m uniq_jax.main" in source
    # What is written to config.json comes back unchanged.
    plain = to_json(spec)
    assert differences(json.loads(json.dumps(plain)), plain) == []


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("method", ["uniq", "n2uq", "uniq_n2uq", "lsq"])
def test_cifar10_takes_width_and_method(bits, method):
    path = next(path for path in CONFIGS if path.stem == "cifar10_resnet20_w2a2")
    spec = c.run_spec(load(path, f"bits={bits},method={method},seed=3"))
    (phase,) = spec.phases
    assert (phase.method, phase.weight_bits, phase.activation_bits) == (method, bits, bits)
    assert spec.seed == 3
    spec = c.run_spec(load(path, "weight_bits=1,activation_bits=4,float_epochs=2"))
    assert [phase.name for phase in spec.phases] == ["float", "quantized"]
    assert (spec.phases[1].weight_bits, spec.phases[1].activation_bits) == (1, 4)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.batch_sise", 4, r"config\.data\.batch_sise .*did you mean 'batch_size'\?"),
        ("sead", 4, r"config\.sead .*did you mean 'seed'\?"),
        ("quantized.weight_bit", 4, r"config\.quantized\.weight_bit .*'weight_bits'"),
        ("quantized.weight_bits", 0, r"config\.quantized\.weight_bits \(=0\) .*1\.\.8"),
        ("quantized.weight_bits", 17, r"config\.quantized\.weight_bits \(=17\) .*1\.\.8"),
        ("quantized.activation_bits", 9, r"config\.quantized\.activation_bits \(=9\)"),
        ("quantized.weight_bits", 2.0, r"config\.quantized\.weight_bits \(=2\.0\) .* int"),
        ("quantized.weight_bits", True, r"config\.quantized\.weight_bits \(=True\) .* int"),
        ("quantized.method", "uniqq", r"method \(='uniqq'\) must be one of .*did you mean 'uniq'"),
        ("quantized.total_epochs", 0.0, r"quantized\.total_epochs \(=0\.0\) must be above 0"),
        ("quantized.optimizer.momentum", 1.0, r"optimizer\.momentum \(=1\.0\)"),
        ("quantized.optimizer.warmup_epochs", 2.0, r"warmup_epochs \(=2\.0\) .*total_epochs"),
        ("seed", "1", r"config\.seed \(='1'\) must be of type int"),
        ("data.augment", "spin", r"config\.data\.augment \(='spin'\) must be one of 'none'"),
        ("data.mean", (0.5, "x"), r"config\.data\.mean\[1\] \(='x'\) must be of type float"),
        ("mesh", {"data": 0, "model": 1}, r"config\.mesh"),
        ("phases", ("float",), r"no section config\.float"),
        ("phases", (), r"config\.phases \(=\(\)\)"),
        ("log_every_steps", 0, r"config\.log_every_steps \(=0\) must be at least 1"),
    ],
)
def test_a_wrong_key_or_value_is_named(key, value, message):
    config = digits()
    *sections, last = key.split(".")
    section = config
    for name in sections:
        section = section[name]
    with section.unlocked(), section.ignore_type():
        section[last] = value
    with pytest.raises(ConfigError, match=message):
        c.run_spec(config)


def test_n2uq_thresholds_have_a_width_of_their_own():
    config = digits()
    config.quantized.method = "n2uq"
    config.quantized.weight_bits = 8
    config.quantized.activation_bits = 5
    assert c.run_spec(config).phases[0].weight_bits == 8
    config.quantized.activation_bits = 6
    with pytest.raises(ConfigError, match=r"activation_bits \(=6\) .*1\.\.5 for method 'n2uq'"):
        c.run_spec(config)


def test_a_missing_key_is_named():
    config = digits()
    del config.data["pad_pixels"]
    with pytest.raises(ConfigError, match=r"config\.data\.pad_pixels is missing"):
        c.run_spec(config)


def test_arguments_have_the_type_of_their_default():
    parsed = c.parse_arg("bits=3,name=x,rate=2,flag", bits=2, name="a", rate=1.0, flag=False)
    assert (parsed.bits, parsed.name, parsed.rate, parsed.flag) == (3, "x", 2.0, True)
    with pytest.raises(ConfigError, match=r"bitz is no known key; did you mean 'bits'"):
        c.parse_arg("bitz=3", bits=2)
    with pytest.raises(ConfigError, match=r"bits \(='two'\) must be of type int"):
        c.parse_arg("bits=two", bits=2)
    with pytest.raises(ConfigError, match=r"phase\.total_epoch is no known key"):
        c.phase("uniq", total_epoch=3)
    with pytest.raises(ConfigError, match=r"phase\.optimizer\.rate is no known key"):
        c.phase("uniq", optimizer={"rate": 3})


def test_differences_name_keys_and_both_values():
    old, new = to_json(c.run_spec(digits())), to_json(c.run_spec(digits()))
    new["data"]["batch_size"] = 7
    new["phases"][0]["weight_bits"] = 3
    assert differences(old, new) == [
        "config.data.batch_size: 128 there, 7 now",
        "config.phases[0].weight_bits: 2 there, 3 now",
    ]
