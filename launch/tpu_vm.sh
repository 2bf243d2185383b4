#!/usr/bin/env bash
# Runs a training on all workers of a Cloud TPU VM, or pod slice, through gcloud.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: launch/tpu_vm.sh --name=TPU --zone=ZONE [OPTIONS] -- ARGUMENTS

ARGUMENTS are those of uniq_jax.main. The same command runs on every worker, where JAX finds the
others by itself. --workdir and the data must be on a file system that all workers mount, Filestore
for example.

  --name=TPU       of the TPU VM
  --zone=ZONE      where it is
  --project=P      gcloud's own by default
  --directory=DIR  checkout on the workers, with its .venv; uniq_jax in the home directory by default
  --dry-run        prints the command and runs nothing
  --help           prints this text
TEXT
}

fail() {
    echo "tpu_vm.sh: $1 (see --help)" >&2
    exit 2
}

# In single quotes, which any shell reads alike: bash's own %q may write $'…', which sh does not know.
quoted() {
    local word quote="'\\''"
    for word; do printf " '%s'" "${word//\'/"$quote"}"; done
}

name='' zone='' project='' directory=uniq_jax run=(exec)
while [ $# -gt 0 ]; do
    case "$1" in
        --name=*) name="${1#*=}" ;;
        --zone=*) zone="${1#*=}" ;;
        --project=*) project="${1#*=}" ;;
        --directory=*) directory="${1#*=}" ;;
        --dry-run) run=(printf '%q ') ;;
        --help | -h) usage && exit ;;
        --) shift && break ;;
        *) fail "unknown option '$1'; arguments of uniq_jax.main follow --" ;;
    esac
    shift
done
[ -n "$name" ] || fail "--name must be given"
[ -n "$zone" ] || fail "--zone must be given"
[ $# -gt 0 ] || fail "the arguments of uniq_jax.main are missing, after --"

# A relative directory is one of the home directory; a quoted ~ would be a name.
remote="cd$(quoted "${directory#\~/}") && exec .venv/bin/python -m uniq_jax.main$(quoted "$@")"
command=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all)
[ -z "$project" ] || command+=("--project=$project")
"${run[@]}" "${command[@]}" "--command=$remote"
echo
