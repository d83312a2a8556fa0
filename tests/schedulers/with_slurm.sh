#!/bin/bash
# Runs a command on a Slurm cluster of two nodes, node1 and node2, that exists only meanwhile:
#
#     tests/schedulers/with_slurm.sh FOLDER COMMAND...
#
# FOLDER gets configuration, state and logs. Needs root, and on Debian: apt-get install slurm-wlm munge.
# Both nodes are this machine. All daemons and jobs live in namespaces of their own for processes,
# mounts and host names, and end with the command. Partitions: low, whose jobs are preempted and
# requeued, and high, whose jobs preempt them.
set -euo pipefail

if [ -z "${WITH_SLURM:-}" ]; then
    WITH_SLURM=1 exec unshare --mount --pid --uts --fork --kill-child --mount-proc "$0" "$@"
fi

mkdir -p "$1"
folder=$(realpath "$1")
shift
hostname controller
printf '127.0.0.1 localhost controller node1 node2\n' > "$folder/hosts"
mount --bind "$folder/hosts" /etc/hosts

cat > "$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=controller(127.0.0.1)
SlurmctldPort=${SLURM_PORT:-17000}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdSpoolDir=$folder/%n
SlurmdPidFile=$folder/%n.pid
SlurmdLogFile=$folder/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
MinJobAge=3600
NodeName=node1 NodeAddr=127.0.0.1 Port=$((${SLURM_PORT:-17000} + 1)) CPUs=2
NodeName=node2 NodeAddr=127.0.0.1 Port=$((${SLURM_PORT:-17000} + 2)) CPUs=2
PartitionName=low Nodes=node[1-2] Default=YES PriorityTier=1 GraceTime=120 MaxTime=INFINITE
PartitionName=high Nodes=node[1-2] PriorityTier=2 MaxTime=INFINITE
CONF
export SLURM_CONF=$folder/slurm.conf

mkdir -p "$folder/state" "$folder/node1" "$folder/node2"
head -c 1024 /dev/urandom > "$folder/munge.key"
chmod 700 "$folder/munge.key"
munged --force --key-file "$folder/munge.key" --socket "$folder/munge.socket" \
    --pid-file "$folder/munged.pid" --log-file "$folder/munged.log" --seed-file "$folder/munged.seed"
slurmctld -c  # without the state of an earlier call
for node in node1 node2; do
    unshare --uts sh -c "hostname $node && exec slurmd"  # a node knows itself by its host name
done
for _ in $(seq 300); do
    idle=$(sinfo --noheader --partition high --states idle --format %D 2> /dev/null || true)
    [ "$idle" = 2 ] && break
    sleep 0.2
done
[ "$idle" = 2 ] || { cat "$folder"/*.log >&2; sinfo >&2; exit 1; }
"$@"
