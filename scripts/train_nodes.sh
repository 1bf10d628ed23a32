#!/bin/sh
# Trains on several machines: run this on each of them, with the same arguments. It needs `bdh` installed on all, and a
# run_dir and data that all of them see, on a shared file system.
#
#   NODES=2 NODE=0 HOST=10.0.0.1 sh scripts/train_nodes.sh --config configs/base.yaml --run_dir /shared/runs/base   on the first
#   NODES=2 NODE=1 HOST=10.0.0.1 sh scripts/train_nodes.sh --config configs/base.yaml --run_dir /shared/runs/base   on the other
#
# NODES: machines. NODE: number of this one; 0 is the first. HOST: address of the first. PROCESSES: processes on each, by
# default one for each GPU, or one. PORT: on which they meet. PYTHON: by default python.
set -eu
: "${NODES:?how many machines}" "${NODE:?number of this machine, from 0}" "${HOST:?address of the machine with number 0}"
PYTHON=${PYTHON:-python}
PROCESSES=${PROCESSES:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
exec "$PYTHON" -m torch.distributed.run \
  --nnodes "$NODES" --node_rank "$NODE" --nproc_per_node "$PROCESSES" \
  --master_addr "$HOST" --master_port "${PORT:-29500}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m bdh train "$@"
