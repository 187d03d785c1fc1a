# shellcheck shell=bash
# What the three job scripts have in common; sourced by them in the folder where sbatch was called.

source slurm/environment.sh

export PYTHONUNBUFFERED=1
# From 22.05 on srun does not take --cpus-per-task from the job: where tasks are bound, every rank would have one CPU.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}

# What Slurm's commands call this job. One task of an array has the number of the whole array as its SLURM_JOB_ID: to
# requeue that would start every task again.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

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

# examine_nodes STAGE
# Looks at every node before each start (foveal doctor). One that should not train is named and ends the job, or is
# excluded from the next start where environment.sh asks for that.
examine_nodes() {
    if [ "$preflight" = 1 ]; then
        local only_named=yes  # it says itself which nodes are to blame
        run_ranks foveal.cli doctor --stage "$1" --slowest "$slowest" "${arguments[@]}"
    fi
}

# run_ranks MODULE ARGUMENTS
# Runs a module as one task of srun per rank. If it fails, ends with its exit code, and asks Slurm for another start where
# one can help. A run that was asked to leave has saved and asked for that itself, and ends with 0. When a node is lost,
# Slurm requeues the job by itself and kills this shell.
run_ranks() {
    local said errors tee code=0 suspects='' first=''
    said=$(mktemp)
    # Slurm's TERM is for the ranks, which save and leave: this shell outlives them to decide what comes next.
    trap '' TERM
    exec {errors}> >(exec tee "$said" >&2)
    tee=$!
    srun --kill-on-bad-exit=1 --wait=300 "${srun_options[@]}" "${ranks[@]}" -m "$@" 2>&"$errors" || code=$?
    exec {errors}>&-
    wait "$tee"
    if [ "$code" -ne 0 ]; then
        first_failure "$said"
        start_again_unless_futile
    fi
    rm -f "$said"
    [ "$code" -eq 0 ] || exit "$code"
}

# Sets `code` to the exit code of the rank that failed first, `first` to what srun says of it, and `suspects` to the node
# where that was: srun ends the other ranks, whose codes say less, and returns the highest of all. A run that knows
# better which node is to blame says so in a line of its own; the examination has one for each bad node.
first_failure() {
    local line named
    line=$(grep -m1 -E '^srun: error: [^ ]+: tasks? [^:]+: ' "$1" || true)
    if [[ $line =~ ^srun:\ error:\ (([^:]+):\ tasks?\ [^:]+:\ (Exited with exit code ([0-9]+))?.*) ]]; then
        first=${BASH_REMATCH[1]} suspects=${BASH_REMATCH[2]} code=${BASH_REMATCH[4]:-$code}
    fi
    named=$(sed -nE 's/^foveal: suspect node ([^ :,]+).*/\1/p' "$1" | awk '!seen[$0]++')
    if [ "$code" -ne 6 ]; then
        named=${named%%$'\n'*}  # ranks that lost one another blame further ones
    fi
    if [ -n "$named" ] || [ -n "${only_named:-}" ]; then
        suspects=$named
    fi
}

# The exit codes are those of foveal/errors.py.
start_again_unless_futile() {
    local futile=''
    case $code in
        2) futile="another start would make the same mistake; it is said above" ;;
        3) futile="the training diverged, and would again" ;;
        4) futile="another attempt has taken over the run" ;;
        6) futile=$(in_the_way) ;;
        7) futile="several starts in a row got no further" ;;
    esac
    if [ -z "$futile" ] && [ "${SLURM_RESTART_COUNT:-0}" -ge "$max_restarts" ]; then
        futile="the job was started again $SLURM_RESTART_COUNT times already (max_restarts in slurm/environment.sh)"
    elif [ -z "$futile" ] && ! going_on; then
        futile="the job was cancelled, or is requeued already"
    fi
    if [ -n "$futile" ]; then
        echo "foveal: exit code $code, not requeued: $futile" >&2
    elif asked_slurm requeue "$job"; then
        echo "foveal: exit code $code, requeued; first to fail: ${first:-unknown}" >&2
        exclude
    else
        echo "foveal: exit code $code, not requeued: Slurm refused; submit it again" >&2
    fi
}

# A job that somebody cancels is not RUNNING any more, and neither is one that is requeued already. One that Slurm ended
# at its time limit, before it could leave, is not either, but is to go on.
going_on() {
    [ "$(of_job JobState)" = RUNNING ] || [ "$(of_job Reason)" = TimeLimit ]
}

# Does without the suspects from the next start on, if environment.sh asks for that and enough others are left. Slurm
# refuses this while a job runs, and remembers it in all later restarts.
exclude() {
    local list
    if [ "$exclude_bad_node" != 1 ] || [ -z "$suspects" ] || ! list=$(without_suspects); then
        return 0
    elif asked_slurm update "JobId=$job" "ExcNodeList=$list"; then
        echo "foveal: excluded from now on: ${suspects//$'\n'/, }; scontrol update JobId=$job ExcNodeList= takes that back" >&2
    fi
}

# What keeps a job that the examination has stopped from going on without the nodes that it named; nothing if nothing does.
in_the_way() {
    if [ -z "$suspects" ]; then
        echo "no node in particular is to blame; what is wrong is said above"
    elif [ "$exclude_bad_node" != 1 ]; then
        echo "a bad node is named above; with FOVEAL_EXCLUDE_BAD_NODE=1 the job goes on without it"
    elif ! without_suspects >/dev/null; then
        echo "too few nodes are left without those named above"
    fi
}

# Prints the job's list of excluded nodes with the suspects in it, if the nodes that are left are enough for the job.
without_suspects() {
    local list left
    list=$(of_job ExcNodeList)
    list=${list/"(null)"/}
    list=${list:+$list,}${suspects//$'\n'/,}
    left=$(sinfo --noheader --Node --responding --partition="$SLURM_JOB_PARTITION" --format=%N | sort -u |
        grep -cvxF "$(scontrol show hostnames "$list")" || true)
    if [ "$left" -lt "$SLURM_JOB_NUM_NODES" ]; then
        echo "foveal: not excluded: ${suspects//$'\n'/, }: $left nodes would be left for $SLURM_JOB_NUM_NODES" >&2
        return 1
    fi
    echo "$list"
}

# of_job KEY: what `scontrol show job` says; keys before Command= only, which quotes what the user typed.
of_job() {
    asked_slurm show job --oneliner "$job" | tr ' ' '\n' | sed -n "1,/^Command=/s/^$1=//p"
}

# asked_slurm ARGUMENTS OF SCONTROL: some times more while the controller does not answer, five minutes in all.
asked_slurm() {
    local try
    for try in {1..10}; do
        if scontrol "$@"; then
            return 0
        fi
        if scontrol ping | grep -q UP; then
            return 1
        fi
        echo "foveal: Slurm's controller does not answer (try $try of 10)" >&2
        sleep 30
    done
    return 1
}
