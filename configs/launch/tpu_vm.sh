#!/bin/bash
# A TPU slice by hand, over ssh: installs this checkout on every host, then starts the same command on all of them.
#
#   TPU=allmem ZONE=us-east5-a bash configs/launch/tpu_vm.sh configs/qwen3_1_7b_128k.py \
#       --model /shared/models/Qwen3-1.7B --texts /shared/data/long_texts --cache /shared/tokens \
#       --out /shared/out/qwen3-1.7b-128k
#
# The slice has to exist, for instance
#
#   gcloud compute tpus tpu-vm create allmem --zone us-east5-a --type v5p --topology 4x4x4 --version v2-alpha-tpuv5
#
# and /shared has to be one disk on all hosts (Filestore, or a bucket through gcsfuse). Ctrl-C ends ssh only: to stop the
# run with a checkpoint, send its processes SIGTERM (STOP=1 with the same command).
set -euo pipefail

: "${TPU:?the name of the slice}" "${ZONE:?its zone}"

on_every_host() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$1"
}

if [[ -n "${STOP:-}" ]]; then
  on_every_host "kill -TERM \$(cat ~/allmem.pid)"
  exit 0
fi

archive="$(mktemp)"
trap 'rm -f "$archive"' EXIT
tar --create --gzip --file "$archive" --exclude='__pycache__' \
  allmem_jax configs pallas_kernels train pyproject.toml README.md LICENSE
gcloud compute tpus tpu-vm scp "$archive" "$TPU:allmem.tar.gz" --zone "$ZONE" --worker=all
on_every_host "mkdir -p ~/allmem && tar --extract --gzip --file ~/allmem.tar.gz --directory ~/allmem && cd ~/allmem && \
  python3 -m pip install --quiet --user uv && python3 -m uv venv --allow-existing --python 3.12 .venv && \
  python3 -m uv pip install --quiet --python .venv/bin/python '.[train,tpu]'"

arguments="$(printf '%q ' "$@")"
on_every_host "cd ~/allmem && echo \$\$ > ~/allmem.pid && JAX_COMPILATION_CACHE_DIR=/tmp/compiled \
  exec .venv/bin/python -m train.finetune $arguments --distributed on"
