#!/usr/bin/env bash
# Runs a training as a Kubernetes JobSet: fills in launch/jobset.yaml and applies it.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: launch/kubernetes.sh --name=NAME --image=IMAGE --pods=N --gpus-per-pod=G --claim=CLAIM \
           [OPTIONS] -- ARGUMENTS

ARGUMENTS are those of uniq_jax.main. Each pod is one process. The claim, which all pods must be able
to mount at once (ReadWriteMany), is at /shared: --workdir=/shared/runs/NAME, and the data, lie there.
The cluster needs the JobSet controller; the image needs uniq_jax.

  --name=NAME        of the JobSet: lower case, digits and -
  --image=IMAGE      of the container
  --pods=N           how many
  --gpus-per-pod=G   GPUs of each
  --claim=CLAIM      persistent volume claim
  --resource=R       what a GPU is called, nvidia.com/gpu by default
  --restarts=R       how often all pods start again after one has failed, 10 by default
  --dry-run          prints the JobSet and applies nothing
  --help             prints this text
TEXT
}

fail() {
    echo "kubernetes.sh: $1 (see --help)" >&2
    exit 2
}

template="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/jobset.yaml"
name='' image='' pods='' gpus='' claim='' resource=nvidia.com/gpu restarts=10 dry_run=false
while [ $# -gt 0 ]; do
    case "$1" in
        --name=*) name="${1#*=}" ;;
        --image=*) image="${1#*=}" ;;
        --pods=*) pods="${1#*=}" ;;
        --gpus-per-pod=*) gpus="${1#*=}" ;;
        --claim=*) claim="${1#*=}" ;;
        --resource=*) resource="${1#*=}" ;;
        --restarts=*) restarts="${1#*=}" ;;
        --dry-run) dry_run=true ;;
        --help | -h) usage && exit ;;
        --) shift && break ;;
        *) fail "unknown option '$1'; arguments of uniq_jax.main follow --" ;;
    esac
    shift
done
[[ "$name" =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
    fail "--name must be given, in lower case letters, digits and -"
plain='^[A-Za-z0-9][A-Za-z0-9._/:@-]*$'
[[ "$image" =~ $plain ]] || fail "--image must be given, the name of an image"
[[ "$pods" =~ ^[1-9][0-9]*$ ]] || fail "--pods must be given, a positive number"
[[ "$gpus" =~ ^[1-9][0-9]*$ ]] || fail "--gpus-per-pod must be given, a positive number"
[[ "$claim" =~ $plain ]] || fail "--claim must be given, the name of a persistent volume claim"
[[ "$resource" =~ $plain ]] || fail "--resource must be the name of a resource"
[[ "$restarts" =~ ^[0-9]+$ ]] || fail "--restarts must be a number"
[ $# -gt 0 ] || fail "the arguments of uniq_jax.main are missing, after --"

# A list of JSON strings, which YAML reads too.
list=''
for argument in "$@"; do
    argument="${argument//\\/\\\\}"
    list+="${list:+, }\"${argument//\"/\\\"}\""
done
filled="$(<"$template")"
# The arguments come last: they may hold anything. Quoted, & stands for itself.
for pair in "NAME=$name" "IMAGE=$image" "PODS=$pods" "COUNT=$gpus" "CLAIM=$claim" \
    "RESOURCE=$resource" "RESTARTS=$restarts" "ARGUMENTS=[$list]"; do
    filled="${filled//"@${pair%%=*}@"/"${pair#*=}"}"
done
if $dry_run; then
    printf '%s\n' "$filled"
else
    printf '%s\n' "$filled" | kubectl apply -f -
fi
