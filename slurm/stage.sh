# shellcheck shell=bash
# What the three job scripts have in common; sourced by them in the folder where sbatch was called.

source slurm/environment.sh

export PYTHONUNBUFFERED=1
# From 22.05 on srun no longer takes --cpus-per-task from the job: without this line every rank gets one CPU.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}

# arguments_of STAGE DEFAULT [CONFIG] [key=value ...]
# Fills the array `arguments` with the config file and the overrides. CONFIG is a file, or NAME for
# configs/STAGE/NAME.yaml; a first argument with an equals sign that is no file is an override of the default config.
arguments_of() {
    local stage=$1 config=$2
    shift 2
    if [ $# -gt 0 ] && [[ $1 != *=* || -f $1 ]]; then
        config=$1
        shift
    fi
    [[ -f $config || $config == */* ]] || config=configs/$stage/${config%.yaml}.yaml
    arguments=("$config" "$@")
}
