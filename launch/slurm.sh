#!/usr/bin/env bash
# Submits a training to SLURM, with one process for each GPU.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: launch/slurm.sh --nodes=N --gpus-per-node=G [OPTIONS] -- ARGUMENTS

ARGUMENTS are those of uniq_jax.main. N x G processes run, which find each other by SLURM's
variables; each takes one GPU. --workdir, the data and this checkout must be on a file system that
all nodes mount. Submitted again, a job that was ended goes on.

  --nodes=N          how many nodes
  --gpus-per-node=G  GPUs, and processes, of each
  --sbatch=OPTION    a further option of sbatch, --sbatch=--time=24:00:00 for example; repeatable
  --dry-run          prints the command and submits nothing
  --help             prints this text

PYTHON names the interpreter, by default that of .venv.
TEXT
}

fail() {
    echo "slurm.sh: $1 (see --help)" >&2
    exit 2
}

# In single quotes, which any shell reads alike: bash's own %q may write $'…', which sh does not know.
quoted() {
    local word quote="'\\''"
    for word; do printf " '%s'" "${word//\'/"$quote"}"; done
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
nodes='' gpus='' options=() run=(exec)
while [ $# -gt 0 ]; do
    case "$1" in
        --nodes=*) nodes="${1#*=}" ;;
        --gpus-per-node=*) gpus="${1#*=}" ;;
        --sbatch=*) options+=("${1#*=}") ;;
        --dry-run) run=(printf '%q ') ;;
        --help | -h) usage && exit ;;
        --) shift && break ;;
        *) fail "unknown option '$1'; arguments of uniq_jax.main follow --" ;;
    esac
    shift
done
[[ "$nodes" =~ ^[1-9][0-9]*$ ]] || fail "--nodes must be given, a positive number"
[[ "$gpus" =~ ^[1-9][0-9]*$ ]] || fail "--gpus-per-node must be given, a positive number"
[ $# -gt 0 ] || fail "the arguments of uniq_jax.main are missing, after --"

arguments="$(quoted "${PYTHON:-$root/.venv/bin/python}" -m uniq_jax.main "$@")"
# Once one process has failed, the step ends.
"${run[@]}" sbatch --job-name=uniq_jax "--nodes=$nodes" "--ntasks-per-node=$gpus" \
    "--gpus-per-node=$gpus" "--chdir=$root" "${options[@]}" \
    "--wrap=srun --kill-on-bad-exit=1$arguments"
echo
