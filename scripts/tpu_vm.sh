#!/usr/bin/env bash
# A Cloud TPU pod by gcloud, which must be installed and logged in to a project.
#
#   scripts/tpu_vm.sh create POD ZONE TYPE [GCLOUD_FLAG ...]  such as v5litepod-256 --spot
#   scripts/tpu_vm.sh setup POD ZONE [FILE ...]     HEAD of this clone, and files, onto all hosts
#   scripts/tpu_vm.sh run POD ZONE COMMAND ...      on all hosts, where it goes on by itself
#   scripts/tpu_vm.sh tail POD ZONE                 follows the first host's output
#   scripts/tpu_vm.sh delete POD ZONE               asks first
#   scripts/tpu_vm.sh babysit POD ZONE TYPE [FILE | GCLOUD_FLAG ...] -- COMMAND ...
#
# babysit does create, setup and run, and does them again whenever the pod is preempted or the run
# ends for a reason that passes, until the run is done (exit code 0) or fails for one that does not
# (2, 3 or 4, its own code). It gives up (1) after 5 failures, or 100 preemptions and refusals, in
# which the run got no further. Started again, it finds the pod and the run. The pod stays.
#
# Options before the action:
#   --dry_run   print the commands and do not run them
#   --queued    the pod is a queued resource: create asks for it, and it comes when there is room
#   --delete    babysit deletes the pod in the end
set -euo pipefail

readonly FOLDER=perceiver_ar_jax_run  # in the home directory of each host
readonly PAUSE=${TPU_VM_PAUSE:-60}  # seconds between looks at a pod; after failures it doubles
readonly LONGEST_PAUSE=1800
readonly MAX_FAILURES=5
readonly MAX_REFUSALS=100
readonly MAX_SILENCE=10  # looks in a row that a pod or a host may leave unanswered
dry_run=false queued=false delete_in_the_end=false folder=
trap '[[ -z $folder ]] || rm -r "$folder"' EXIT

main() {
  while [[ ${1-} == --* ]]; do
    case $1 in
      --dry_run) dry_run=true ;;
      --queued) queued=true ;;
      --delete) delete_in_the_end=true ;;
      *) usage_error "no option '$1'" ;;
    esac
    shift
  done
  (($# >= 3)) || usage_error "an action, a pod and a zone are needed"
  action=$1 pod=$2 zone=$3
  shift 3
  case $action in
    create) create "$@" ;;
    setup) setup "$@" ;;
    run) run "$@" ;;
    tail) tpu_vm ssh "$pod" --worker=0 --command="tail -n 100 -F $FOLDER/output.log" ;;
    delete) delete ;;
    babysit) babysit "$@" ;;
    *) usage_error "no action '$action'" ;;
  esac
}

create() {
  local image
  image=$(image_of "${1-}") || exit
  if $queued; then
    queued_resources create "$pod" --node-id="$pod" --accelerator-type="$1" \
      --runtime-version="$image" "${@:2}"
  else
    tpu_vm create "$pod" --accelerator-type="$1" --version="$image" "${@:2}"
  fi
}

image_of() {
  case $1 in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) usage_error "$action needs a type such as v5litepod-256, not '$1'" ;;
  esac
}

delete() {
  if $queued; then
    queued_resources delete "$pod" --force "$@"
  else
    tpu_vm delete "$pod" "$@"
  fi
}

setup() {
  local archive
  [[ -n $folder ]] || folder=$(mktemp -d)
  archive=$folder/code.tar.gz
  execute git archive --output="$archive" HEAD &&
    on_all_hosts "mkdir -p $FOLDER" &&
    tpu_vm scp "$archive" "$@" "$pod:$FOLDER" --worker=all &&
    install_on_all_hosts
}

install_on_all_hosts() {
  # The images' own Python is too old; uv brings a newer one.
  on_all_hosts "cd $FOLDER && tar -xzf code.tar.gz && pip install --quiet uv &&" \
    "python3 -m uv venv --quiet --allow-existing --python=3.12 .venv &&" \
    "python3 -m uv pip install --quiet --editable '.[tpu]'"
}

run() {
  (($# >= 1)) || usage_error "run needs a command"
  local command
  command="$(printf '%q ' "$@")> output.log 2>&1; echo \$? > exit_code"
  # What an earlier run left behind would hold the chips.
  on_all_hosts "cd $FOLDER && . .venv/bin/activate && rm -f exit_code &&" \
    "{ kill -KILL -- -\$(cat group 2> /dev/null) 2> /dev/null || true; } &&" \
    "{ setsid nohup bash -c $(printf '%q' "$command") > /dev/null 2>&1 < /dev/null &" \
    "echo \$! > group; }"
}

babysit() {
  local type=${1-} files=() flags=()
  while shift && (($#)) && [[ $1 != -- ]]; do
    if [[ $1 == --* ]]; then flags+=("$1"); else files+=("$1"); fi
  done
  (($# >= 2)) || usage_error "babysit needs a type, and a command after --"
  command=("${@:2}")
  image_of "$type" > /dev/null
  failures=0 refusals=0 furthest=0
  local is_set_up=false problem
  if $dry_run; then
    create "$type" "${flags[@]}"
    setup "${files[@]}"
    run "${command[@]}"
    return
  fi
  while true; do
    case $(state) in
      READY | ACTIVE) ;;
      MISSING)
        say "creating $pod"
        is_set_up=false
        # In an "if", bash does not end the script when a command fails.
        if ! problem=$(create "$type" "${flags[@]}" 2>&1); then
          say "refused: $(tail -n 3 <<< "$problem" | tr '\n' ' ')"
          if grep -qiE 'capacity|resource_exhausted|unavailable|stockout' <<< "$problem"; then
            refused
          else
            failed
          fi
        fi
        continue
        ;;
      PREEMPTED | TERMINATED | SUSPENDED | FAILED)
        say "$pod is preempted or has failed"
        delete --quiet || true
        refused
        continue
        ;;
      UNKNOWN)
        say "gcloud does not describe $pod"
        failed
        continue
        ;;
      *)  # being made or deleted
        sleep "$PAUSE"
        continue
        ;;
    esac
    if ! $is_set_up && is_running; then
      say "the run is there"
    elif { $is_set_up || setup "${files[@]}"; } && run "${command[@]}"; then
      say "started the run"
    else
      say "could not start the run"
      failed
      continue
    fi
    is_set_up=true
    watch
  done
}

# Returns when the run, or the pod, has to be started again.
watch() {
  local silence=0 found codes
  while ((silence < MAX_SILENCE)); do
    sleep "$PAUSE"
    if ! found=$(look); then
      silence=$((silence + 1))
      case $(state) in
        READY | ACTIVE | UNKNOWN) continue ;;
        *) return 0 ;;
      esac
    fi
    note_progress "$found"
    codes=$(awk '{print $1}' <<< "$found" | sort -u)
    for code in 2 3 4; do
      if grep -qx "$code" <<< "$codes"; then
        say "the run failed with exit code $code, which a restart does not mend; its last lines:"
        tpu_vm ssh "$pod" --worker=all --command="tail -n 5 $FOLDER/output.log" || true
        finish "$code"
      fi
    done
    if [[ $codes == 0 ]]; then
      say "the run is done"
      finish 0
    elif [[ $codes == running ]]; then
      silence=0
    elif grep -qx running <<< "$codes"; then
      silence=$((silence + 1))  # the others leave by themselves
    else
      say "the run ended with exit code $(tr '\n' ' ' <<< "$codes")at step $furthest"
      failed
      return 0
    fi
  done
  say "a host gave no answer, or did not end with the others"
  failed
}

# For each host a line: the exit code of its process, "running", or "vanished", then the last step
# that it printed.
look() {
  on_all_hosts "cd $FOLDER && { cat exit_code ||" \
    "{ kill -0 -- -\$(cat group) && echo running; } || echo vanished; } 2> /dev/null |" \
    "tr '\\n' ' ' && echo \$(grep -o '^step [0-9]*' output.log | tail -n 1)"
}

is_running() {
  local found
  found=$(look) && grep -q '^running' <<< "$found"
}

note_progress() {
  local step
  step=$(awk '$2 == "step" && $3 > most {most = $3} END {print most + 0}' <<< "$1")
  if ((step > furthest)); then
    furthest=$step failures=0 refusals=0
  fi
}

state() {
  local found refusal=
  if $queued; then
    found=$(queued_resources describe "$pod" --format='value(state.state)' 2>&1) || refusal=$?
  else
    found=$(tpu_vm describe "$pod" --format='value(state)' 2>&1) || refusal=$?
  fi
  if [[ -z $refusal ]]; then
    echo "$found"
  elif [[ $found == *NOT_FOUND* || $found == *"not found"* ]]; then
    echo MISSING
  else
    echo UNKNOWN
  fi
}

failed() {
  failures=$((failures + 1))
  ((failures < MAX_FAILURES)) || give_up "$failures failures"
  sleep_doubling "$failures"
}

refused() {
  refusals=$((refusals + 1))
  ((refusals < MAX_REFUSALS)) || give_up "$refusals preemptions and refusals"
  sleep_doubling "$refusals"
}

sleep_doubling() {
  local pause=$((PAUSE * 2 ** ($1 < 10 ? $1 - 1 : 9)))
  sleep $((pause < LONGEST_PAUSE ? pause : LONGEST_PAUSE))
}

give_up() {
  say "giving up after $1 in which the run got no further than step $furthest"
  finish 1
}

finish() {
  if $delete_in_the_end; then
    delete --quiet || true
  else
    say "the pod still costs; to delete it: scripts/tpu_vm.sh delete $pod $zone"
  fi
  exit "$1"
}

say() {
  echo "$(date -u +%FT%TZ) $*"
}

on_all_hosts() {
  tpu_vm ssh "$pod" --worker=all --command="$*"
}

tpu_vm() {
  execute gcloud compute tpus tpu-vm "$@" --zone="$zone"
}

queued_resources() {
  execute gcloud compute tpus queued-resources "$@" --zone="$zone"
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
  local usage="scripts/tpu_vm.sh [--dry_run] [--queued] [--delete]"
  usage+=" create|setup|run|tail|delete|babysit POD ZONE [...]"
  echo "tpu_vm.sh: $1; usage: $usage" >&2
  exit 2
}

main "$@"
