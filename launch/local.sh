#!/usr/bin/env bash
# Runs a training on this machine, in one process with all its devices.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: launch/local.sh [--dry-run] ARGUMENTS

ARGUMENTS are those of uniq_jax.main, --config=configs/… --workdir=… for example.

  --dry-run  prints the command and runs nothing
  --help     prints this text

PYTHON names the interpreter, by default that of .venv.
TEXT
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
run=(exec)
case "${1:-}" in
    --help | -h) usage && exit ;;
    --dry-run) run=(printf '%q ') && shift ;;
esac
if [ $# -eq 0 ]; then
    usage >&2
    exit 2
fi
# shellcheck source=launch/malloc.env
. "$root/launch/malloc.env"
"${run[@]}" "${PYTHON:-$root/.venv/bin/python}" -m uniq_jax.main "$@"
echo
