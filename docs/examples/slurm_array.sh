#!/bin/bash
# A run shared by the jobs of an array: each takes the next batch that nobody has, and any of them may end or begin at any time.
#   sbatch docs/examples/slurm_array.sh pasta/shapes-reading /shared/runs/pasta
# A job that is cut off at its time limit loses one batch; submit the array again, and it goes on where it stopped.
#SBATCH --job-name=attnsteer
#SBATCH --array=0-7
#SBATCH --cpus-per-task=4
#SBATCH --time=01:00:00
#SBATCH --signal=B:TERM@60
#SBATCH --output=attnsteer-%A-%a.log
# On GPUs instead: #SBATCH --gpus-per-task=1
set -euo pipefail
recipe=$1 out=$2
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-4}
# The scheduler's signal reaches this script; the process below must get it.
attnsteer run "$recipe" --out "$out" --join &
trap 'kill -TERM $!' TERM
wait $!
