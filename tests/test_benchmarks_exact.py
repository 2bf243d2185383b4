"""Which networks `make exact` compares."""

import argparse

import pytest
from benchmark_scripts import exact_cases, exact_foundation
from flax import nnx

from uniq_jax import deploy

METHODS = ["uniq", "n2uq", "uniq_n2uq"]
EVERY = list(exact_cases.cases(list(exact_cases.NETWORKS), METHODS, [1, 2, 3, 4, 8]))


def test_every_network_method_width_and_granularity_is_there():
    preset = [case for case in EVERY if case.ends == "preset"]
    found = {(x.network, x.method, x.weight_bits, x.activation_bits, x.granularity) for x in preset}
    expected = {
        (network, method, bits, min(bits, 5) if "n2uq" in method else bits, granularity)
        for network in exact_cases.NETWORKS
        for method in METHODS
        for bits in (1, 2, 3, 4, 8)
        for granularity in ("layer", "channel")
        if (method, granularity) != ("n2uq", "channel")
    }
    assert found == expected
    # Results are kept in files of these names.
    assert len({str(case) for case in EVERY}) == len(EVERY)


@pytest.mark.parametrize("method", ["uniq", "n2uq"])
def test_both_methods_have_networks_without_float_layers(method):
    networks = {x.network for x in EVERY if x.method == method and x.ends == "8-bit"}
    assert networks == set(exact_cases.NETWORKS)


@pytest.mark.parametrize("ends", ["preset", "8-bit"])
@pytest.mark.parametrize(("method", "bits"), [("uniq", 1), ("uniq", 2), ("n2uq", 2)])
def test_a_case_says_whether_layers_stay_float(method, bits, ends):
    case = exact_cases.Case("resnet20", method, bits, bits, "layer", ends)
    layers = deploy.layers(deploy.freeze(case.create(), (8, 8, 3)))
    is_float = [layer.weight_bits == 32 or layer.activation_bits == 32 for layer in layers]
    assert any(is_float) is case.has_float_layers
    assert len(layers) == len(
        [m for _, m in nnx.iter_modules(case.create()) if hasattr(m, "kernel")]
    )


def test_code_is_what_python_makes_of_it(tmp_path):
    path = tmp_path / "module.py"

    def code(text):
        path.write_text(text)
        return exact_foundation.code_of(path)

    plain = code("def f(x):\n    return x + 1\n")
    told = code('"""A module."""\n\ndef f(x):  # Why.\n    """One more."""\n    return x + 1\n')
    assert told == plain
    assert code("def f(x):\n    return x + 2\n") != plain
    assert code("def f(x):\n    return 'text'\n") != code("def f(x):\n    return 'other'\n")


def test_results_of_fewer_images_elsewhere_are_others():
    numbers = {"runtime_images": 50, "qonnx_images": 5, "steps": 300}
    arguments = [argparse.Namespace(**numbers), argparse.Namespace(**{**numbers, "steps": 1})]
    first, again, other = (
        exact_foundation.foundation_of(a) for a in (arguments[0], arguments[0], arguments[1])
    )
    assert first == again != other
