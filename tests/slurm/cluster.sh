#!/usr/bin/env bash
# One machine as a SLURM cluster: a controller and a node, no systemd, no cgroups, no database, one pretended GPU.
#
#   bash tests/slurm/cluster.sh up      as root, on Debian; installs the packages slurm-wlm and munge if need be
#   bash tests/slurm/cluster.sh down    always, afterwards: with a slurm.conf but no controller Snakemake starts slowly
set -euo pipefail
STATE=${TMPDIR:-/tmp}/sparsight-slurm
HOST=$(hostname -s)

wait_for() { for _ in $(seq 100); do "$@" > /dev/null 2>&1 && return; sleep 0.1; done; "$@"; }
idle() { [ "$(sinfo -h -o %T)" = idle ]; }

up() {
    [ ! -e /etc/slurm/slurm.conf ] || { echo "/etc/slurm/slurm.conf exists: there is a SLURM here already" >&2; exit 1; }
    type slurmctld slurmd munged > /dev/null 2>&1 || {
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
    }
    mkdir -p "$STATE"/{controller,node} /etc/slurm
    install -d -o munge -g munge -m 755 /run/munge
    munge -n > /dev/null 2>&1 || {
        setpriv --reuid=munge --regid=munge --clear-groups munged --force --pid-file=/run/munge/sparsight.pid
    }
    wait_for munge -n
    touch "$STATE/gpu0"
    echo "NodeName=$HOST Name=gpu File=$STATE/gpu0" > "$STATE/gres.conf"
    echo "CgroupAutomount=no" > "$STATE/cgroup.conf"
    cat > "$STATE/slurm.conf" << END
ClusterName=sparsight
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$STATE/controller
SlurmdSpoolDir=$STATE/node
SlurmctldPidFile=$STATE/slurmctld.pid
SlurmdPidFile=$STATE/slurmd.pid
SlurmctldLogFile=$STATE/slurmctld.log
SlurmdLogFile=$STATE/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=sched_interval=1,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
MpiDefault=none
ReturnToService=2
EnforcePartLimits=ALL
# Finished jobs stay visible to squeue, which stands for the missing accounting.
MinJobAge=7200
KillWait=10
GresTypes=gpu
# Training asks for several processors, whatever this machine has.
SlurmdParameters=config_overrides
NodeName=$HOST NodeAddr=127.0.0.1 CPUs=$(( $(nproc) > 4 ? $(nproc) : 4 )) RealMemory=$(awk '/MemTotal/ {print int($2 / 1100)}' /proc/meminfo) Gres=gpu:1
PartitionName=main Nodes=$HOST Default=YES MaxTime=INFINITE State=UP
END
    # srun loses SLURM_CONF on its way, so the files lie where SLURM looks by itself.
    for file in slurm.conf gres.conf cgroup.conf; do ln -sf "$STATE/$file" /etc/slurm/$file; done
    slurmctld -c
    slurmd
    wait_for idle
}

down() {
    [ "$(readlink /etc/slurm/slurm.conf)" = "$STATE/slurm.conf" ] || return 0
    scancel --user=root --signal=KILL 2> /dev/null || true
    for daemon in slurmd slurmctld; do
        [ ! -s "$STATE/$daemon.pid" ] || kill "$(cat "$STATE/$daemon.pid")" 2> /dev/null || true
    done
    [ ! -s /run/munge/sparsight.pid ] || kill "$(cat /run/munge/sparsight.pid)"
    rm /etc/slurm/{slurm,gres,cgroup}.conf
    wait_for [ ! -e "$STATE/slurmd.pid" ]  # which a daemon removes when it ends
    wait_for [ ! -e "$STATE/slurmctld.pid" ]
    rm -rf "$STATE"
}

case ${1:-} in up | down) "$1" ;; *) echo "usage: $0 up|down" >&2; exit 2 ;; esac
