#!/bin/bash
# Usage: TPU_NAME=... ZONE=... launch/tpu.sh setup REPOSITORY
#        TPU_NAME=... ZONE=... launch/tpu.sh train --config=... --workdir=...
# Runs the same command on every host of a Cloud TPU slice. The workdir must be on a file system
# that every host mounts, a Filestore share for example.
set -eu

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all --command="$1"
}

action=$1
shift
case $action in
  setup)
    on_all_hosts "git clone $1 mpq_jax && cd mpq_jax && python3 -m venv .venv &&
      .venv/bin/pip install --editable . 'jax[tpu]'"
    ;;
  train)
    on_all_hosts "cd mpq_jax && .venv/bin/mpq train --distributed$(printf ' %q' "$@")"
    ;;
  *)
    echo "unknown action: $action; wanted setup or train" >&2
    exit 2
    ;;
esac
