#!/bin/sh
# Trains with one process in each of two network namespaces, as on two machines joined by a cable. Needs root.
#
#   sudo sh scripts/two_namespaces.sh --config configs/tiny.yaml --train.max_steps 20 --run_dir runs/namespaces
set -eu
PYTHON=${PYTHON:-python}
names="bdh-a bdh-b"
cleanup() { for name in $names; do ip netns del "$name" 2>/dev/null || true; done; }
trap cleanup EXIT
cleanup
for name in $names; do ip netns add "$name"; ip -n "$name" link set lo up; done
ip link add cable netns bdh-a type veth peer name cable netns bdh-b
ip -n bdh-a addr add 10.77.0.1/24 dev cable
ip -n bdh-b addr add 10.77.0.2/24 dev cable
for name in $names; do ip -n "$name" link set cable up; done

export NODES=2 HOST=10.77.0.1 PROCESSES=1 PYTHON GLOO_SOCKET_IFNAME=cable OMP_NUM_THREADS=1
NODE=1 ip netns exec bdh-b sh scripts/train_nodes.sh "$@" &
NODE=0 ip netns exec bdh-a sh scripts/train_nodes.sh "$@"
wait $!
