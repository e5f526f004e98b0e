#!/bin/bash
# One run on four nodes, one worker each, with all GPUs of its node: sbatch deploy/slurm.sh
# Each worker finds the others by srun's variables (--cluster=slurm). It goes on by itself for as long as it ends with 75.
#SBATCH --job-name=pretrain
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

# The signal is passed on; srun gives it to all tasks.
trap 'kill -TERM "$!"' TERM
srun --kill-on-bad-exit=0 python run.py --cluster=slurm --strategy=multi_worker --worker_timeout=600 \
  --flagfile=configs/pretrain_r50_1x_sk0.flags --mode=train_then_eval \
  --data_dir="${DATA_DIR:-/data}" --model_dir="${MODEL_DIR:-/runs/pretrain_r50}" &
wait "$!"
status=$?
if [ "$status" -gt 128 ]; then # The signal has ended this wait, not the command.
  wait "$!"
  status=$?
fi
if [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
