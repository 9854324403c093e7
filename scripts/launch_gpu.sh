#!/usr/bin/env bash
# Runs one command on several hosts with NVIDIA GPUs, as one program. The first host decides and prints.
#
#   scripts/launch_gpu.sh --hosts gpu1,gpu2 jaxserve run-batch -i in.jsonl -o out.jsonl --model /models/M \
#       --tensor-parallel-size 16 --distributed
#
#   --hosts A,B     by ssh, one process for each host with all of its GPUs
#   --directory D   where jaxserve is checked out on every host (default: this checkout's path)
#   --port N        free port of the first host (default: 8476)
#   --stop          end what an earlier call with these --hosts has left running
#
# Without --hosts inside of a Slurm job: srun starts the tasks of the job, one for each GPU:
#
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 scripts/launch_gpu.sh jaxserve run-batch ... --distributed
#
# Commands are those of jaxserve with --distributed, or Python scripts that call jaxserve.distributed.initialize().
# Code and model must lie at the same path on every host, and the hosts must reach each other, by these names, on all ports.
set -euo pipefail

fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

hosts="" port=8476 stop="" directory=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
while [ $# -gt 0 ]; do
  case "$1" in
  -h | --help)
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
  --stop) stop=1 && shift ;;
  --hosts | --port | --directory)
    [ $# -ge 2 ] || fail "$1 needs a value"
    declare "${1#--}=$2" && shift 2
    ;;
  -*) fail "unknown option $1; --help lists them" ;;
  *) break ;;
  esac
done
[ -n "$stop" ] || [ $# -gt 0 ] || fail "there is no command to run; --help shows one"

if [ -z "$hosts" ]; then
  [ -n "${SLURM_JOB_ID:-}" ] || fail "give --hosts, or run it in a Slurm job"
  exec srun --kill-on-bad-exit=1 "$@"
fi

# The process id of the command is kept, because ssh leaves what it started running when it is itself ended.
pid_file=.jaxserve-launch.pid
IFS=, read -ra names <<<"$hosts"
if [ -n "$stop" ]; then
  for name in "${names[@]}"; do
    ssh -o BatchMode=yes "$name" "kill \$(cat $pid_file)" || true
  done
  exit 0
fi

start() { # start INDEX [SSH OPTION...]: the command on one host
  local index=$1 settings
  shift
  settings=(
    "JAXSERVE_COORDINATOR_ADDRESS=${names[0]#*@}:$port"
    "JAXSERVE_NUM_PROCESSES=${#names[@]}"
    "JAXSERVE_PROCESS_ID=$index"
    "PATH=\$PWD/.venv/bin:\$PATH"
  )
  ssh -o BatchMode=yes "$@" "${names[index]}" \
    "echo \$\$ >$pid_file; cd $(printf %q "$directory") && export ${settings[*]} && exec ${command_line}"
}

command_line=$(printf '%q ' "$@")
for ((index = 1; index < ${#names[@]}; index++)); do
  start "$index" -n &
done
status=0
if [ -t 0 ] && [ -t 1 ]; then # a terminal of its own, so that Ctrl-C and line editing reach it
  start 0 -t || status=$?
else
  start 0 || status=$?
fi
for pid in $(jobs -p); do
  wait "$pid" || status=$?
done
exit "$status"
