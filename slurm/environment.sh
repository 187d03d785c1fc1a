# shellcheck shell=bash disable=SC2034
# The settings of a cluster, and the only file under slurm/ to edit for a new one. The three job scripts source it in the
# batch shell, in the folder where sbatch was called; srun passes exported variables to every rank.
# Tested: a virtual environment on a shared filesystem (Slurm 22.05). Written from the manuals, not tested: modules,
# Apptainer, pyxis.

# --- 1. Where Python is. A virtual environment on a filesystem that every node sees; without one, the PATH of sbatch.
venv=${FOVEAL_VENV:-.venv}
if [ -f "$venv/bin/activate" ]; then
    source "$venv/bin/activate"
fi

#     Modules (not tested): load them before the virtual environment is activated.
# module purge; module load python/3.12 cuda/12.8

# --- 2. How a Python command runs: `check` once, in the batch shell, before srun; `ranks` as every task of srun.
check=(python)
ranks=(python)
srun_options=()

#     Apptainer (not tested): the image has foveal and its dependencies, this folder is mounted over it.
# check=(apptainer exec --bind "$PWD" foveal.sif python)
# ranks=(apptainer exec --nv --bind "$PWD" foveal.sif python)

#     pyxis (not tested): containers exist only inside srun, so the check is a task of its own.
# srun_options=(--container-image="$PWD/foveal.sqsh" --container-mounts="$PWD:$PWD" --container-workdir="$PWD")
# check=(srun --nodes=1 --ntasks=1 "${srun_options[@]}" python)

# --- 3. The shared filesystem: the configs say `data.path: ${FOVEAL_DATA}/imagenet` and the like.
# export FOVEAL_DATA=/path/that/every/node/sees

# --- 4. The network between nodes (not tested): only where NCCL or gloo choose the wrong interface.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# --- 5. Failures. A failed job is requeued after a pause; each failed start in a row takes the next pause, and the last one
#     repeats. If more starts in a row fail before an attempt begins than there are pauses (no environment on a node, a
#     failed import, ranks that die in the preflight), the job ends and names the node. An attempt that begins and makes
#     no progress counts for the setting run.max_attempts_without_progress. max_restarts limits all other restarts
#     without progress, such as storage that does not answer. Progress resets all counts; preemptions do not count.
#     A node is excluded only with exclude_bad_node=1, because an error of all nodes would exclude one after the other.
read -ra pauses <<<"${FOVEAL_PAUSES:-10 30 90}"  # seconds
max_restarts=${FOVEAL_MAX_RESTARTS:-100}
exclude_bad_node=${FOVEAL_EXCLUDE_BAD_NODE:-0}

# --- 6. `foveal doctor` checks the nodes before every start, in about half a minute; 0 turns it off. A node is bad if its
#     matrix products are slower than this fraction of the other ranks' median. Lower it for nodes shared with other jobs.
preflight=${FOVEAL_PREFLIGHT:-1}
slowest=${FOVEAL_SLOWEST:-0.8}
