"""Configs: every file loads, and what is wrong is named."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import re

import pytest
from flax import nnx

from uniq_jax import config as c
from uniq_jax.nn import QuantConv
from uniq_jax.spec import ConfigError, RunSpec, differences, from_json, to_json
from uniq_jax.train import start

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))

# The rows of both papers: method, data, network and widths.
ROWS = [
    *(("n2uq", "imagenet2012", f"resnet{depth}", b) for depth in (18, 34, 50) for b in (2, 3, 4)),
    ("n2uq", "imagenet2012", "mobilenet_v2", 4),
    *(("uniq", "imagenet2012", f"preact_resnet{d}", b) for d in (18, 34) for b in (1, 2, 3, 4)),
    *(("uniq", "imagenet2012", "mobilenet_v2", b) for b in (2, 3, 4)),
    *(("uniq", "cifar100", "preact_resnet32", b) for b in (1, 2, 3, 4)),
]


def row_file(method, data, network, bits):
    prefix = ("uniq_" if method == "uniq" else "") + ("cifar100_" if data == "cifar100" else "")
    stem = f"{prefix}{network}_w{bits}a{bits}"
    return next(path for path in CONFIGS if path.stem == stem)


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
    read = json.loads(json.dumps(plain))
    assert differences(read, plain) == []
    assert from_json(read) == spec


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


def test_every_row_of_both_papers_has_a_file_that_says_what_it_does():
    for method, data, network, bits in ROWS:
        path = row_file(method, data, network, bits)
        spec = c.run_spec(load(path))
        (phase,) = spec.phases
        assert (phase.method, phase.weight_bits, phase.activation_bits) == (method, bits, bits)
        assert (spec.data.name, spec.model.name) == (data, network)
        note = " ".join(path.read_text().split())
        assert f"configs/{path.name}" in note
        assert f"runs/{path.stem}" in note
        assert ("Published: top-1" in note) == (method == "n2uq")
        assert ("soft labels of a float ResNet-101 alone" in note) == (method == "n2uq")
        assert ("Published accuracy: not found by us" in note) == (method == "uniq")
        # What the note says of the recipe is what the config does.
        recipe = note[note.index("Recipe") :]
        epochs, batch, rate = (
            re.search(pattern, recipe)[1]
            for pattern in (r"(?:over|,) (\d+) epochs", r"batch (\d+)", r"rate ([\d.e-]+)")
        )
        optimizer = phase.optimizer
        assert (phase.total_epochs, spec.data.batch_size) == (float(epochs), int(batch))
        assert optimizer.learning_rate == float(rate)
        assert optimizer.name == {"n2uq": "adam", "uniq": "sgd"}[method]
        decay = re.search(r"(no decay|decay ([\d.e-]+))", recipe)[2] or 0
        assert optimizer.weight_decay == float(decay)
        assert phase.calibration_batches == {"n2uq": 0, "uniq": 100}[method]
        assert (optimizer.warmup_epochs, optimizer.warmup_learning_rate) == (
            (5.0, 0.001) if (method, bits) == ("uniq", 1) else (0.0, 0.0)
        )


def build(path, arg=None):
    """The networks of a config's phases, without arrays."""
    spec = c.run_spec(load(path, arg))
    options = {"num_classes": 10, "in_features": 3, "seed": 0}
    return [
        nnx.eval_shape(functools.partial(start.build_model, spec.model, phase, **options))
        for phase in spec.phases
    ]


def widths(model):
    """Weight and activation width by path; None where it is float."""
    return {
        "/".join(map(str, path)): tuple(
            quantizer and quantizer.method.bits
            for quantizer in (module.weight_quantizer, module.activation_quantizer)
        )
        if isinstance(module, QuantConv)
        else (None, None)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Conv)
    }


@pytest.mark.parametrize("method", ["uniq", "n2uq"])
def test_a_row_builds_with_quantized_and_with_float_shortcuts(method):
    path = row_file("n2uq", "imagenet2012", "resnet18", 2)
    ends = {"uniq": (8, 8), "n2uq": (None, None)}[method]
    for shortcut, expected in (("", (2, 2)), (",float_shortcut", (None, None))):
        (model,) = build(path, f"method={method}{shortcut}")
        found = widths(model)
        assert found["conv1"] == ends
        assert found["layer2/0/conv1"] == (2, 2)
        assert found["layer2/0/downsample"] == expected


def test_the_float_phase_has_the_shape_of_the_quantized_one():
    path = row_file("n2uq", "imagenet2012", "resnet18", 2)
    floats, quantized = (
        {
            path
            for path in dict(nnx.to_flat_state(nnx.state(model)))
            if "_quantizer" not in str(path)
        }
        for model in build(path, "float_epochs=128")
    )
    assert floats == quantized
    first, second = c.run_spec(load(path, "float_epochs=128")).phases
    assert first.optimizer == second.optimizer
    cifar = row_file("uniq", "cifar100", "preact_resnet32", 1)
    first = c.run_spec(load(cifar, "float_epochs=120")).phases[0]
    assert (first.optimizer.learning_rate, first.optimizer.weight_decay) == (0.1, 5e-4)


def test_mobilenet_rows_build():
    (model,) = build(row_file("n2uq", "imagenet2012", "mobilenet_v2", 4))
    assert type(model.conv2.activation_quantizer.method).__name__ == "PactActivation"
    (model,) = build(row_file("uniq", "imagenet2012", "mobilenet_v2", 4))
    assert model.blocks[1].conv1.activation_quantizer.method.signed
    assert not model.blocks[1].conv2.activation_quantizer.method.signed


@pytest.mark.parametrize("row", [ROWS[0], ("uniq", "cifar100", "preact_resnet32", 2)])
def test_a_row_takes_a_teacher(row):
    path = row_file(*row)
    spec = c.run_spec(load(path, "teacher=T,float_epochs=1"))
    for phase in spec.phases:
        loss = phase.loss
        assert (loss.teacher, loss.teacher_weight, loss.teacher_temperature) == ("T", 1.0, 1.0)
        assert loss.teacher_model == {"n2uq": "resnet101", "uniq": "preact_resnet32"}[row[0]]
    spec = c.run_spec(load(path, "teacher=T,teacher_model=resnet50"))
    assert spec.phases[0].loss.teacher_model == "resnet50"
    assert not c.run_spec(load(path)).phases[0].loss.teacher
    with pytest.raises(ConfigError, match=r"loss\.teacher_model \(='resnet50'\) must be ''"):
        c.run_spec(load(path, "teacher_model=resnet50"))


def test_smoke_is_the_same_network_and_recipe_in_short():
    for row in ROWS:
        path = row_file(*row)
        spec, smoke = (c.run_spec(load(path, arg)) for arg in (None, "smoke"))
        assert smoke.model == spec.model
        assert (smoke.data.name, smoke.data.data_dir) == ("digits", "")
        short, whole = smoke.phases[0], spec.phases[0]
        assert short.total_epochs == 1.0
        assert short.calibration_batches <= 2
        shortened = ("total_epochs", "calibration_batches", "optimizer")
        assert dataclasses.replace(short, **{k: getattr(whole, k) for k in shortened}) == whole


def test_a_row_runs(tmp_path, run_main):
    path = row_file("uniq", "cifar100", "preact_resnet32", 1)
    process = run_main(
        f"--config={path}:smoke",
        "--config.model.name=preact_resnet8",
        "--config.export.formats=",
        f"--workdir={tmp_path}",
    )
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 4


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
        (
            "quantized.optimizer.quantizer_freeze_fraction",
            1.5,
            r"freeze_fraction \(=1\.5\) .*\[0, 1\]",
        ),
        ("quantized.batch_norm_batches", -1, r"quantized\.batch_norm_batches \(=-1\) .*at least 0"),
        ("quantized.ema_decay", 1.0, r"quantized\.ema_decay \(=1\.0\) must be in \[0, 1\)"),
        ("seed", "1", r"config\.seed \(='1'\) must be of type int"),
        ("data.augment", "spin", r"config\.data\.augment \(='spin'\) must be one of 'none'"),
        ("data.mean", (0.5, "x"), r"config\.data\.mean\[1\] \(='x'\) must be of type float"),
        ("mesh", {"data": 0, "model": 1}, r"config\.mesh"),
        ("phases", ("float",), r"no section config\.float"),
        ("phases", (), r"config\.phases \(=\(\)\)"),
        (
            "export.formats",
            "packd",
            r"config\.export\.formats \(='packd'\) must be formats of packed",
        ),
        ("export.format", "onnx", r"config\.export\.format .*did you mean 'formats'"),
        ("export.batch", -1, r"config\.export\.batch \(=-1\) must be at least 0"),
        ("export.check_images", 0, r"config\.export\.check_images \(=0\) must be at least 1"),
        ("log_every_steps", 0, r"config\.log_every_steps \(=0\) must be at least 1"),
        ("layer_metrics_every_steps", -1, r"layer_metrics_every_steps \(=-1\) must be at least 0"),
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


def test_n2uq_weights_have_no_granularity():
    config = digits()
    config.quantized.granularity = "channel"
    assert c.run_spec(config).phases[0].granularity == "channel"
    config.quantized.method = "n2uq"
    with pytest.raises(ConfigError, match=r"quantized\.granularity \(='channel'\) must be 'layer'"):
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


def test_a_cifar_network_may_have_the_activations_of_n2uq():
    """Its teacher, a float network of the same architecture, has ReLUs."""
    path = next(path for path in CONFIGS if path.stem == "cifar10_resnet20_w2a2")
    spec = c.run_spec(load(path, "activation=biased_prelu,teacher=float.npz"))
    assert spec.model.options == {"shortcut": "A", "activation": "biased_prelu"}
    assert spec.phases[0].loss.teacher_options == {"shortcut": "A"}
    assert c.run_spec(load(path)).model.options == {"shortcut": "A"}


def test_export_formats_are_separated_by_commas():
    config = digits()
    assert c.run_spec(config).export.names == ("packed",)
    config.export.formats = "onnx, packed,onnx"
    assert c.run_spec(config).export.names == ("onnx", "packed")
    config.export.formats = ""
    assert c.run_spec(config).export.names == ()


def test_differences_name_keys_and_both_values():
    old, new = to_json(c.run_spec(digits())), to_json(c.run_spec(digits()))
    new["data"]["batch_size"] = 7
    new["phases"][0]["weight_bits"] = 3
    assert differences(old, new) == [
        "config.data.batch_size: 128 there, 7 now",
        "config.phases[0].weight_bits: 2 there, 3 now",
    ]
