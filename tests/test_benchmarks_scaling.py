"""What devices send each other, as benchmarks read it from compiled programs."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest
import small_runs
from benchmark_scripts import BENCHMARKS, collectives, scaling, steps

from uniq_jax.models import registry
from uniq_jax.train import sharding

ROOT = BENCHMARKS.parent

PROGRAM = """\
HloModule jit_step

FileNames
1 "/site/uniq_jax/data_parallel.py"
2 "/site/uniq_jax/nn/batch_norm.py"
3 "/site/uniq_jax/quantizers/uniq.py"
4 "/site/uniq_jax/nn/conv.py"

FunctionNames
1 "total"

FileLocations
1 {file_name_id=2 function_name_id=1 line=1 end_line=1 column=1 end_column=1}
2 {file_name_id=1 function_name_id=1 line=2 end_line=2 column=1 end_column=1}
3 {file_name_id=3 function_name_id=1 line=3 end_line=3 column=1 end_column=1}
4 {file_name_id=4 function_name_id=1 line=4 end_line=4 column=1 end_column=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=1}
4 {file_location_id=4 parent_frame_id=1}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %placed = f32[4,2,16]{2,1,0} fusion(%p), metadata={op_name="reduce_sum" stack_frame_id=2}
  %of_step = f32[] reduce(%p), metadata={op_name="reduce_sum" stack_frame_id=3}
  %of_kernel = bf16[3,3,16,32]{3,2,1,0} convolution(%p), metadata={op_name="x" stack_frame_id=4}
  %inputs = s8[30,16,16,16]{3,2,1,0} fusion(%p)
  %all-reduce.1 = f32[4,2,16]{2,1,0} all-reduce(%placed), replica_groups={{0,2,4,6},{1,3,5,7}}
  %all-reduce.2 = (f32[], bf16[3,3,16,32]{3,2,1,0}) all-reduce(%of_step, %of_kernel), \
replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  %all-gather-start = (s8[30,16,16,16], s8[30,16,16,32]) all-gather-start(%inputs), \
replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, dimensions={3}
  %all-gather-done = s8[30,16,16,32] all-gather-done(%all-gather-start)
  %first = f32[] get-tuple-element(%all-reduce.2), index=0
}
"""
DATA, MODEL = ((0, 2, 4, 6), (1, 3, 5, 7)), ((0, 1), (2, 3), (4, 5), (6, 7))


def test_collectives_are_read_from_a_program():
    found = collectives.collectives(PROGRAM, 8)
    assert [(c.kind, c.groups, [p.shape for p in c.parts]) for c in found] == [
        ("all-reduce", DATA, [(4, 2, 16)]),
        ("all-reduce", DATA, [(), (3, 3, 16, 32)]),
        ("all-gather", MODEL, [(30, 16, 16, 16)]),
    ]
    (norm,), (step, kernel), (inputs,) = (c.parts for c in found)
    assert [part.size for part in (norm, step, kernel, inputs)] == [512, 4, 9216, 30 * 16**3]
    assert [pathlib.Path(source).name for source in norm.sources] == [
        "data_parallel.py",
        "batch_norm.py",
    ]
    assert found[0].sent(norm) == 512 * 2 * 3 / 4
    assert found[2].payload(inputs) == 2 * inputs.size
    assert found[2].sent(inputs) == inputs.size
    axes = [scaling.axis_of(collective, (4, 2)) for collective in found]
    assert axes == ["data", "data", "model"]
    assert [
        scaling.carried(part, axis, 30)
        for collective, axis in zip(found, axes)
        for part in collective.parts
    ] == ["batch norm", "quantizers", "gradients", "activations"]
    totals = scaling.totals(found, (4, 2), 30)
    assert totals["instructions"] == {"all-reduce": 2, "all-gather": 1}
    assert totals["carried"][0] == {
        "group": "batch norm",
        "kind": "all-reduce",
        "axis": "data",
        "arrays": 1,
        "bytes": 512,
        "sent": 768.0,
    }


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,1},{2,3}}, x", ((0, 1), (2, 3))),
        ("{}, x", ((0, 1, 2, 3),)),
        ("[2,2]<=[4], x", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0), x", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'a'}, x", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=1,'c'=2] {'b','c'}, x", ((0, 1), (2, 3))),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", ((0, 2), (1, 3))),
    ],
)
def test_groups_of_devices_are_read(written, groups):
    line = f"  %r = f32[2]{{0}} all-reduce(%x), channel_id=1, replica_groups={written}"
    text = f"ENTRY %main () -> f32[] {{\n  %x = f32[2]{{0}} parameter(0)\n{line}\n}}\n"
    (found,) = collectives.collectives(text, 4)
    assert found.groups == groups


def test_groups_in_an_unknown_form_are_an_error():
    text = PROGRAM.replace("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", "mesh['a'=8] {'a':(1)2}")
    with pytest.raises(ValueError, match=r"replica_groups \(=\"mesh\['a'=8"):
        collectives.collectives(text, 8)


def test_a_collective_in_a_loop_is_an_error():
    text = PROGRAM.replace("%sum = f32[] add(%x, %y)", "%sum = f32[] all-reduce(%x)")
    with pytest.raises(ValueError, match="all-reduce in add"):
        collectives.collectives(text, 8)


CHILD = """
import sys
sys.path.insert(0, "benchmarks")
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from collectives import collectives
from scaling import axis_of
from uniq_jax.train import sharding

mesh = sharding.create_mesh({"data": 2, "model": 2})

def f(x):
    whole = jax.lax.all_gather(x, "model")
    return jax.lax.psum(whole.sum(0), "data"), jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])

here = P("data", "model")
f = jax.shard_map(f, mesh=mesh, in_specs=here, out_specs=(P(), here), check_vma=False)
text = jax.jit(f).lower(jax.ShapeDtypeStruct((4, 6), "float32")).compile().as_text()
for c in collectives(text, 4):
    print(c.kind, axis_of(c, (2, 2)), [p.shape for p in c.parts], [c.payload(p) for p in c.parts])
"""


def test_collectives_are_read_from_what_xla_compiles(quick_compilation):
    flags = quick_compilation["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    environment = {**os.environ, **quick_compilation, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD]
    child = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    assert set(child.stdout.splitlines()) == {
        "all-gather model [(1, 2, 3)] [48]",
        "all-reduce data [(2, 3)] [24]",
        "collective-permute data [(2, 3)] [24]",
    }


def test_a_step_is_built_from_shapes_or_arrays(monkeypatch):
    monkeypatch.setitem(registry.MODELS, "small", small_runs.Small)
    monkeypatch.setitem(steps.NETWORKS, "small", ({"name": "small", "in_features": 3}, 12, 6, 10))
    assert str(steps.Case("small", "uniq", 2)) == "small uniq W2A2"
    assert steps.Case("small").batch_size == 6
    case = steps.Case("small", batch=4)
    program = case.program()
    mesh = sharding.create_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    state, batch = case.shapes(program, mesh)
    made, examples = jax.eval_shape(lambda: case.state(program)), case.examples()
    for shapes, arrays in ((state, made), (batch, examples)):
        described = [jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (shapes, arrays)]
        assert described[0] == described[1]
    assert examples["image"].shape == (4, 12, 12, 3)
    for step in (steps.jitted(program), steps.jitted_on(mesh, program, state)):
        after, metrics = jax.eval_shape(step, state, batch)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert set(metrics) == {"loss", "accuracy", "gradient_norm", "learning_rate"}


def test_the_page_on_scaling_has_the_figures_of_its_formulas():
    page = (ROOT / "docs" / "scaling.md").read_text()
    # Elements of kernels and biases, features of batch norms.
    sizes = {"preact_resnet32": (470_292, 1_136), "resnet18": (11_679_912, 4_800)}
    rows = re.findall(
        r"^\| (\w+) (\w+)[^|]* \| \d+ \| (\d) x 1 \| \d+ \| 0 \| ([\d,]+) \| ([\d,]+) \|",
        page,
        re.M,
    )
    assert len(rows) == 14
    for network, method, devices, *found in rows:
        kernels, features = sizes[network]
        is_alone = devices == "1"
        copies = 1 if method == "float" else int(devices)
        wanted = [0, 0] if is_alone else [4 * kernels, 4 * 5 * features * copies]
        assert [int(text.replace(",", "")) for text in found] == wanted, (network, method, devices)
