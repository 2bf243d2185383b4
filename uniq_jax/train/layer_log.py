"""When the layers of a phase are measured, and where the numbers go."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from uniq_jax import data_parallel
from uniq_jax.spec import PhaseSpec
from uniq_jax.train import (
    compilation,
    layer_metrics,
    layer_summary,
    memory,
    processes,
    sharding,
)
from uniq_jax.train.logs import MetricsWriter, write_json
from uniq_jax.train.network import Teacher
from uniq_jax.train.run import Run
from uniq_jax.train.state import Program, TrainState

LAYERS_FILE = "layers.json"


class LayerLog:
    """Measures the quantized layers every so many steps, and at the last one.

    The numbers go to the writer, tables and histograms to `WORKDIR/PHASE/layers.json`, which always
    has the newest ones. Where a device cannot hold what measuring takes, nothing is measured.

    Args:
      run: knows the devices and how often to measure.
      program: of the phase.
      phase: which; a float one is not measured.
      directory: the phase's.
      writer: of metrics.
      total_steps: of the phase.
      note: is told if nothing is measured.
    """

    def __init__(
        self,
        run: Run,
        program: Program,
        phase: PhaseSpec,
        directory: Path,
        writer: MetricsWriter,
        total_steps: int,
        note: Callable[[str], None],
    ):
        self._phase, self._path, self._writer = phase.name, directory / LAYERS_FILE, writer
        self._program, self._total_steps = program, total_steps
        self._every = 0 if phase.is_float else run.spec.layer_metrics_every_steps
        self._run, self._note = run, note
        self._compiled: jax.stages.Compiled | None = None

    def measure(
        self,
        step: int,
        state: TrainState,
        batch: Mapping[str, jax.Array],
        teacher: Teacher | None,
    ) -> dict[str, dict[str, Any]] | None:
        """Starts to measure the step that takes this state, if its turn has come."""
        if self._every == 0 or (step % self._every and step != self._total_steps):
            return None
        if self._compiled is None:
            self._compiled = self._compile(state, batch, teacher)
        if self._compiled is None:
            self._every = 0
            return None
        return self._compiled(state, batch, teacher)

    def _compile(self, *arguments: Any) -> jax.stages.Compiled | None:
        """The program that measures; None if it does not fit on a device of any process."""
        run = self._run
        measure = jax.jit(
            data_parallel.on_mesh(run.mesh, layer_metrics.measure, self._program),
            out_shardings=sharding.replicated(run.mesh),
            compiler_options=compilation.compiler_options(),
        )
        compiled, reason = None, "another process has no room for it"
        try:
            compiled, _ = memory.compile_step(
                measure,
                arguments,
                limit_gib=run.spec.memory_limit_gib,
                advice="Training goes on.",
                what="that",
            )
        except memory.MemoryShortage as shortage:
            reason = str(shortage)
        if processes.all_true(compiled is not None):
            return compiled
        self._note(f"{self._phase}: its layers are not measured: {reason}")
        return None

    def write(
        self, step: int, state: TrainState, measured: Mapping[str, Mapping[str, Any]] | None
    ) -> None:
        """Writes what was measured, if anything was; of `state` only the shapes count."""
        if measured is None or jax.process_index() != 0:
            return
        found = jax.device_get(measured)
        model = self._program.build(state.params, state.statistics)
        table = layer_summary.layers_table(model, found)
        numbers = {row["path"]: row["numbers"] for row in table["layers"]}
        histograms = {
            f"{row['path']}/{what}": (
                layer_summary.histogram_edges(row[what]["histogram"]),
                row[what]["histogram"]["counts"],
            )
            for row in table["layers"]
            for what in ("weight", "input")
            if what in row
        }
        self._writer.write_layers(self._phase, step, numbers, histograms)
        write_json(self._path, {"phase": self._phase, "step": step, **table})
