# shellcheck shell=bash
# What the three job scripts have in common; sourced by them in the folder where sbatch was called.

source slurm/environment.sh

export PYTHONUNBUFFERED=1
# From 22.05 on srun does not take --cpus-per-task from the job: where tasks are bound, every rank would have one CPU.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}

# arguments_of DEFAULT [CONFIG] [key=value ...]
# Fills the array `arguments` with the config and the overrides; a first argument with an equals sign that is no file is
# an override of the default config. What a config's name means is the stage's business.
arguments_of() {
    local config=$1
    shift
    if [ $# -gt 0 ] && [[ $1 != *=* || -f $1 ]]; then
        config=$1
        shift
    fi
    arguments=("$config" "$@")
}
