#!/bin/bash
# Trains in one process on each host; mpirun passes SIGTERM on to all of them.
# docs/schedulers/mpirun.sh hosts.txt configs/wf42m_pfc02_r100_32gpus.py --workdir /shared/runs/r100 ...
# hosts.txt has a line `HOST slots=1` for each host.
hosts=$1
shift
exec mpirun --hostfile "$hosts" --map-by node --bind-to none \
    .venv/bin/python scripts/train.py "$@"
