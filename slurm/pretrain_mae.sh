#!/usr/bin/env bash
# Masked-autoencoder pretraining: one srun task per rank.
#
#   sbatch [SBATCH OPTIONS] slurm/pretrain_mae.sh [CONFIG] [key=value ...]
#
# from the root of the repository. CONFIG: a file, or NAME for configs/pretrain/NAME.yaml (default: mae_vit_b16).
# Options of sbatch win over the lines below: --nodes=1 --ntasks-per-node=4 --gpus-per-node=4 on a smaller cluster,
# --gpus-per-node=0 on one without GPUs (where sbatch says "Invalid generic resource (gres) specification").
#SBATCH --job-name=pretrain-mae
#SBATCH --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 --distribution=block:block
#SBATCH --time=24:00:00 --signal=USR1@180 --requeue --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?this is a job script: sbatch slurm/pretrain_mae.sh}"
[ -f slurm/stage.sh ] || { echo "$PWD is not the root of the repository: call sbatch there" >&2; exit 2; }
source slurm/stage.sh
arguments_of mae_vit_b16 "$@"

check_settings pretrain.run
examine_nodes pretrain
run_ranks pretrain.run "${arguments[@]}"
