#!/usr/bin/env bash
# A Cloud TPU pod by gcloud, which must be installed and logged in to a project.
#
#   scripts/tpu_vm.sh create POD ZONE TYPE [GCLOUD_FLAG ...]  such as v5litepod-256 --spot
#   scripts/tpu_vm.sh setup POD ZONE [FILE ...]     HEAD of this clone, and files, onto all hosts
#   scripts/tpu_vm.sh run POD ZONE COMMAND ...      on all hosts, where it goes on by itself
#   scripts/tpu_vm.sh tail POD ZONE                 follows the first host's output
#   scripts/tpu_vm.sh delete POD ZONE               asks first
#
# With --dry_run before the action, the commands are printed and not run.
set -euo pipefail

readonly FOLDER=perceiver_ar_jax_run  # in the home directory of each host
dry_run=false

main() {
  if [[ ${1-} == --dry_run ]]; then
    dry_run=true
    shift
  fi
  (($# >= 3)) || usage_error "an action, a pod and a zone are needed"
  action=$1 pod=$2 zone=$3
  shift 3
  case $action in
    create) create "$@" ;;
    setup) setup "$@" ;;
    run) run "$@" ;;
    tail) tpu_vm ssh "$pod" --worker=0 --command="tail -n 100 -F $FOLDER/output.log" ;;
    delete) tpu_vm delete "$pod" ;;
    *) usage_error "no action '$action'" ;;
  esac
}

create() {
  local image
  case ${1-} in
    v4-*) image=tpu-ubuntu2204-base ;;
    v5litepod-*) image=v2-alpha-tpuv5-lite ;;
    v5p-*) image=v2-alpha-tpuv5 ;;
    v6e-*) image=v2-alpha-tpuv6e ;;
    *) usage_error "create needs a type such as v5litepod-256, not '${1-}'" ;;
  esac
  tpu_vm create "$pod" --accelerator-type="$1" --version="$image" "${@:2}"
}

setup() {
  archive=$(mktemp -d)/code.tar.gz
  trap 'rm -r "$(dirname "$archive")"' EXIT
  execute git archive --output="$archive" HEAD
  on_all_hosts "mkdir -p $FOLDER"
  tpu_vm scp "$archive" "$@" "$pod:$FOLDER" --worker=all
  # The images' own Python is too old; uv brings a newer one.
  on_all_hosts "cd $FOLDER && tar -xzf code.tar.gz && pip install --quiet uv &&" \
    "python3 -m uv venv --quiet --allow-existing --python=3.12 .venv &&" \
    "python3 -m uv pip install --quiet --editable '.[tpu]'"
}

run() {
  (($# >= 1)) || usage_error "run needs a command"
  on_all_hosts "cd $FOLDER && . .venv/bin/activate &&" \
    "{ nohup$(printf ' %q' "$@") > output.log 2>&1 < /dev/null & }"
}

on_all_hosts() {
  tpu_vm ssh "$pod" --worker=all --command="$*"
}

tpu_vm() {
  execute gcloud compute tpus tpu-vm "$@" --zone="$zone"
}

execute() {
  if $dry_run; then
    printf '%q' "$1"
    printf ' %q' "${@:2}"
    echo
  else
    "$@"
  fi
}

usage_error() {
  local usage="scripts/tpu_vm.sh [--dry_run] create|setup|run|tail|delete POD ZONE [...]"
  echo "tpu_vm.sh: $1; usage: $usage" >&2
  exit 2
}

main "$@"
