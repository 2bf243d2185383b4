#!/usr/bin/env bash
# Runs a training on this machine in several processes, which meet over the loopback interface.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: launch/local_processes.sh --processes=N [OPTIONS] -- ARGUMENTS

ARGUMENTS are those of uniq_jax.main, --config=configs/… --workdir=… for example. Process i gets the
i-th GPU (a single process all of them), or, by --cpu-devices, none. Process 0 prints the progress;
all print their errors. If one fails the others end too, and its exit code is that of the script.

  --processes=N    how many
  --cpu-devices=M  each process takes the CPU as M devices
  --port=P         where process 0 listens, 8476 by default
  --dry-run        prints the commands and runs nothing
  --help           prints this text

PYTHON names the interpreter, by default that of .venv.
TEXT
}

fail() {
    echo "local_processes.sh: $1 (see --help)" >&2
    exit 2
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
processes='' cpu_devices='' port=8476 dry_run=false
while [ $# -gt 0 ]; do
    case "$1" in
        --processes=*) processes="${1#*=}" ;;
        --cpu-devices=*) cpu_devices="${1#*=}" ;;
        --port=*) port="${1#*=}" ;;
        --dry-run) dry_run=true ;;
        --help | -h) usage && exit ;;
        --) shift && break ;;
        *) fail "unknown option '$1'; arguments of uniq_jax.main follow --" ;;
    esac
    shift
done
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || fail "--processes must be given, a positive number"
[[ "$cpu_devices" =~ ^([1-9][0-9]*)?$ ]] || fail "--cpu-devices must be a positive number"
[[ "$port" =~ ^[1-9][0-9]*$ ]] || fail "--port must be a positive number"
[ $# -gt 0 ] || fail "the arguments of uniq_jax.main are missing, after --"

# shellcheck source=launch/malloc.env
. "$root/launch/malloc.env"
pids=()
# A signal to the script is one to every process.
trap 'for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done' TERM INT
for ((i = 0; i < processes; i++)); do
    command=(env "GLIBC_TUNABLES=$GLIBC_TUNABLES")
    if [ -n "$cpu_devices" ]; then
        flags="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$cpu_devices"
        command+=(JAX_PLATFORMS=cpu "XLA_FLAGS=$flags")
    else
        command+=("JAX_LOCAL_DEVICE_IDS=$i")
    fi
    command+=("${PYTHON:-$root/.venv/bin/python}" -m uniq_jax.main "$@"
        "--coordinator=127.0.0.1:$port" "--num_processes=$processes" "--process_id=$i")
    if $dry_run; then
        printf '%q ' "${command[@]}"
        echo
    else
        "${command[@]}" &
        pids+=($!)
    fi
done
code=0
for pid in "${pids[@]}"; do
    # A trapped signal interrupts wait: wait again for the same process.
    while true; do
        this=0
        wait "$pid" || this=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    # 69 and 134: it ended because another one did, whose own code says why.
    case "$this" in
    0) ;;
    69 | 134) [ "$code" -ne 0 ] || code=$this ;;
    *) case "$code" in 0 | 69 | 134) code=$this ;; esac ;;
    esac
done
exit "$code"
