#!/usr/bin/env bash
# Runs one command on all hosts of a Cloud TPU slice, as one program. The hosts find each other; the first decides and prints.
#
#   scripts/launch_tpu.sh --name my-slice --zone us-east5-b --install
#   scripts/launch_tpu.sh --name my-slice --zone us-east5-b jaxserve run-batch -i in.jsonl -o out.jsonl \
#       --model Qwen/Qwen3-32B --tensor-parallel-size 16 --distributed
#   scripts/launch_tpu.sh --name my-slice --zone us-east5-b --stop
#
#   --name, --zone  of the slice, as `gcloud compute tpus tpu-vm list` has them
#   --project P     if it is not gcloud's own
#   --install       copy the committed files of this checkout to every host, and install them there in ~/jaxserve/.venv
#   --stop          end what an earlier call has left running
#
# Commands are those of jaxserve with --distributed, or Python scripts that call jaxserve.distributed.initialize(). They run in
# ~/jaxserve; a model is a hub id, or a folder that every host has at the same path. Files are read and written on the first.
set -euo pipefail

fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

name="" zone="" project="" action=run
while [ $# -gt 0 ]; do
  case "$1" in
  -h | --help)
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
  --install | --stop) action=${1#--} && shift ;;
  --name | --zone | --project)
    [ $# -ge 2 ] || fail "$1 needs a value"
    declare "${1#--}=$2" && shift 2
    ;;
  -*) fail "unknown option $1; --help lists them" ;;
  *) break ;;
  esac
done
[ -n "$name" ] && [ -n "$zone" ] || fail "give --name and --zone of the slice"
[ "$action" != run ] || [ $# -gt 0 ] || fail "there is no command to run; --help shows one"
command -v gcloud >/dev/null || fail "gcloud is not on the PATH; see https://cloud.google.com/sdk/docs/install"

options=(--zone "$zone" --worker all)
[ -z "$project" ] || options+=(--project "$project")

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$name" "${options[@]}" --command "$1"
}

# The process id of the command is kept, because ssh leaves what it started running when it is itself ended.
pid_file=.jaxserve-launch.pid
case "$action" in
install)
  folder=$(mktemp -d)
  trap 'rm -r "$folder"' EXIT
  git -C "$(dirname "${BASH_SOURCE[0]}")/.." archive --prefix jaxserve/ -o "$folder/jaxserve.tar.gz" HEAD
  gcloud compute tpus tpu-vm scp "$folder/jaxserve.tar.gz" "$name:" "${options[@]}"
  on_all_hosts "tar xzf jaxserve.tar.gz && cd jaxserve && bash -c '. scripts/venv.sh && install tpu 4000'"
  ;;
stop) on_all_hosts "kill \$(cat $pid_file)" ;;
run) on_all_hosts "echo \$\$ >$pid_file; cd jaxserve && export PATH=\$PWD/.venv/bin:\$PATH && exec $(printf '%q ' "$@")" ;;
esac
