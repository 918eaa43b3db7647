#!/usr/bin/env bash
# A run on the nodes of one Slurm job. From the top of a checkout that all nodes see, with its .venv made by `make setup`:
#
#     sbatch --nodes=2 launch/cluster/slurm.sh pipeline configs/beaver-7b/pipeline.yaml workspace=/shared/beaver-7b
#
# Arguments are those of beaver-ray; workspace=/... must be among them. Ray starts on every node with a token of this
# job's own, the command runs on the first node, and the job ends with its exit code. Nodes must not be shared: at the end
# `ray symmetric-run` stops every Ray of this user on them. HEAD_ADDRESS=IP chooses among several networks.
#SBATCH --job-name=beaver-ray
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
set -euo pipefail

workspace=
for argument in "$@"; do
    case $argument in workspace=/*) workspace=${argument#workspace=} ;; esac
done
if [ -z "$workspace" ]; then
    echo "error: workspace=/... is missing: an absolute folder that all nodes see" >&2
    exit 2
fi

cd "$SLURM_SUBMIT_DIR"
export PATH="$PWD/.venv/bin:$PATH"

# Only this user may read the token, and it goes with the job.
state=$workspace/.slurm-$SLURM_JOB_ID
trap 'rm -rf "$state"' EXIT
(
    umask 077
    mkdir -p "$state"
    python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$state/token"
)
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$state/token
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 RAY_USAGE_STATS_ENABLED=0

# This script runs on the first node. The port differs from job to job and lies outside of the range of Ray's workers.
head=${HEAD_ADDRESS:-$(hostname -I | awk '{ print $1 }')}
address=$head:$((20000 + SLURM_JOB_ID % 10000))

# symmetric-run ends with 0 where Ray does not start, so the command leaves its exit code behind.
command='RAY_ADDRESS=$1 beaver-ray "${@:3}"; code=$?; echo $code >"$2"; exit $code'
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
    bash -c "$command" beaver-ray "$address" "$state/code" "$@" || true
exit "$(cat "$state/code" 2>/dev/null || echo 1)"
