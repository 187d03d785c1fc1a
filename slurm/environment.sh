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

# --- 5. What happens after a failure. The job is requeued, after a pause that grows with every start that came to nothing;
#     the last one stays. As many starts in a row as there are pauses may fail again before any attempt has begun (the
#     environment is missing on a node, a library cannot be imported, ranks die in the preflight): then the job ends and
#     names the node. An attempt that began and saved nothing new counts for run.max_attempts_without_progress of the settings. max_restarts
#     bounds whatever else came to nothing, storage that does not answer above all; a start that gets further than any
#     before sets all counts back, and being preempted counts for nothing. No node is excluded unless that is asked for,
#     since a mistake that shows on every node would use them up one by one.
read -ra pauses <<<"${FOVEAL_PAUSES:-10 30 90}"  # seconds
max_restarts=${FOVEAL_MAX_RESTARTS:-100}
exclude_bad_node=${FOVEAL_EXCLUDE_BAD_NODE:-0}

# --- 6. Before every start `foveal doctor` looks at the nodes, which takes half a minute. 0: it does not. A node is bad if
#     its products are slower than this share of its peers' median; nodes that are shared with other jobs want a lower one.
preflight=${FOVEAL_PREFLIGHT:-1}
slowest=${FOVEAL_SLOWEST:-0.8}
