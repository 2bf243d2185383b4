"""What is counted of compiled programs: of this machine, and of others with their compilers."""

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from benchmark_scripts import BENCHMARKS, programs

SCRIPT = BENCHMARKS / "accelerators" / "compare.py"
HLO = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8,128]{1,0})->f32[]}

%region (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

ENTRY %main.1 (x.1: f32[8,128], y.1: s8[8,128]) -> (f32[], bf16[8,128]) {
  %x.1 = f32[8,128]{1,0:T(8,128)} parameter(0), metadata={op_name="x"}
  %y.1 = s8[8,128]{1,0:T(8,128)(4,1)} parameter(1)
  %zero = f32[]{:T(128)} constant(0)
  %copy-start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%x.1)
  %copy-done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%copy-start), metadata={op_name="{(x)}"}
  %both = (f32[]{:T(128)}, /*index=1*/bf16[8,128]{1,0:T(8,128)}) fusion(%copy-done, %y.1, %zero)
  %total = f32[]{:T(128)} get-tuple-element(%both), index=0
  %rest = bf16[8,128]{1,0} get-tuple-element(%both), index=1
  %root = f32[]{:T(128)} add(%total, %zero)
  ROOT %tuple = (f32[]{:T(128)}, bf16[8,128]{1,0}) tuple(%root, %rest)
}
"""


def test_operations_of_a_text():
    fusion, add = programs.operations(HLO)
    assert (fusion.kind, fusion.name) == ("fusion", "both")
    assert fusion.written == 4 + 2 * 8 * 128
    # Of the prefetched array its reader is counted, not the copy.
    assert fusion.read == 4 * 8 * 128 + 8 * 128 + 4
    assert (add.kind, add.written, add.read) == ("add", 4, 8)


def test_a_loop_is_refused():
    text = HLO.replace("add(%total, %zero)", "while(%total), body=%b, condition=%c")
    with pytest.raises(ValueError, match="has a while, root"):
        programs.operations(text)


def test_a_program_of_this_machine():
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    lowered = jax.jit(lambda x: jnp.tanh(x) * 2 + 1).trace(x).lower()
    program = programs.compiled(lowered)
    assert program.moved == 2 * 4 * 64 * 128
    assert len(program.operations) == 1


@pytest.mark.parametrize(
    ("target", "package"), [("h100", "jax_cuda12_plugin"), ("v5e", "libtpu")], ids=str
)
def test_gradients_of_a_quantizer_are_had_in_one_pass(target, package, tmp_path):
    name = f"{target}_n2uq_activation2_arrays"
    results = tmp_path / "results.json"
    process = subprocess.run(
        [sys.executable, str(SCRIPT), name, f"--results={results}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    if importlib.util.find_spec(package) is None:
        assert f"{name}: not measured without" in process.stdout
        assert not results.exists()
        pytest.skip(f"{package} is not installed; `make accelerators` has an environment with it")
    (row,) = json.loads(results.read_text())
    # Forward: one array read, one written; backward: two read, one written; XLA may share a read.
    assert 4 <= row["value"] < 5.1


def test_unknown_figures_are_named():
    process = subprocess.run(
        [sys.executable, str(SCRIPT), "h100_speed"], capture_output=True, text=True, check=False
    )
    assert process.returncode == 2
    assert "NAME (='h100_speed') must be one of: h100_uniq_weight2_arrays" in process.stderr
