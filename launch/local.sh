#!/usr/bin/env bash
# Runs the main job on this machine: launch/local.sh --config=configs/… --workdir=…
# PYTHON names the interpreter, by default that of .venv.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# XLA allocates its memory anew in every step; huge pages make that cheaper on a CPU.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
exec "${PYTHON:-$root/.venv/bin/python}" -m uniq_jax.main "$@"
