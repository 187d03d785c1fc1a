# shellcheck shell=bash
# The common part of the three job scripts, which source it in the folder where sbatch was called.

# NCCL ends every rank by SIGABRT at a time-out: each would leave a core dump of its whole memory on the shared disk. The
# hard limit stays, so that environment.sh may ask for dumps (ulimit -S -c unlimited).
ulimit -S -c 0

source slurm/environment.sh
declare -p pauses >/dev/null 2>&1 || pauses=(10 30 90)

export PYTHONUNBUFFERED=1
# sbatch --export=NONE, or one that names variables, applies to this shell only: every rank gets this shell's environment.
export SLURM_EXPORT_ENV=ALL
# Since 22.05 srun does not inherit --cpus-per-task: with task binding every rank would have one CPU.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}

# The job's name for Slurm's commands. One task of an array has the array's number as its SLURM_JOB_ID: requeueing that
# number would restart every task.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# The number of starts without progress must survive a requeue to another node. Slurm counts all restarts alike, the job's
# comment belongs to the user, the log may be /dev/null, and the run directory is unknown if Python does not start. The
# folder of sbatch is visible on every node, or this file could not have been read.
counts=runs/.restarts-${SLURM_CLUSTER_NAME:-slurm}-$job

# arguments_of DEFAULT [CONFIG] [key=value ...]
# Fills the array `arguments` with the config and the overrides; a first argument with an equals sign that is no file is
# an override of the default config. The stage resolves the config's name.
arguments_of() {
    local config=$1
    shift
    if [ $# -gt 0 ] && [[ $1 != *=* || -f $1 ]]; then
        config=$1
        shift
    fi
    arguments=("$config" "$@")
}

# check_settings MODULE
# Validates the settings. A mistake (a setting, missing shards, a batch that the ranks do not divide) ends the job here, with
# one sentence and code 2.
check_settings() {
    local mistake_is_said=yes node=${SLURMD_NODENAME:-unknown}
    watched "${check[@]}" -m "$1" "${arguments[@]}" --check --ranks "$SLURM_NTASKS"
}

# examine_nodes STAGE
# Checks every node before each start (foveal doctor). A bad node is named and ends the job, or is excluded from the next
# start if environment.sh asks for that.
examine_nodes() {
    if [ "$preflight" = 1 ]; then
        local only_named=yes  # the doctor names the bad nodes itself
        run_ranks foveal.cli doctor --stage "$1" --slowest "$slowest" "${arguments[@]}"
    fi
}

# run_ranks MODULE ARGUMENTS
# Runs a module as one task of srun per rank. A run that was asked to stop has saved and exits with 0. It has requeued the
# job itself; or it received a SIGTERM for which Slurm has no reason, and this shell requeues, which knows whether srun
# sent the signal because another rank failed. If a node is lost, Slurm requeues the job itself and kills this shell.
run_ranks() {
    local node=unknown
    watched srun --kill-on-bad-exit=1 --wait=300 "${srun_options[@]}" "${ranks[@]}" -m "$@"
    if [ -z "${only_named:-}" ] && [ -f "$counts" ] && going_on; then
        rm -f "$counts"  # the run is finished
    fi
}

# watched COMMAND
# Runs a command. If it fails, exits with its code, after a requeue if another start can help.
watched() {
    local said errors tee code=0 suspects='' first=''
    said=$(mktemp)
    # Slurm's TERM is for the ranks, which save and exit; this shell must survive them to decide about a requeue.
    trap '' TERM
    exec {errors}> >(exec tee "$said" >&2)
    tee=$!
    "$@" 2>&"$errors" || code=$?
    exec {errors}>&-
    wait "$tee"
    if [ "$code" -ne 0 ]; then
        first_failure
        start_again_unless_futile
    elif grep -q '^foveal: saved and left on SIGTERM' "$said" && going_on; then
        asked_slurm requeue "$job" || echo "foveal: not requeued: Slurm refused; submit it again" >&2
    fi
    rm -f "$said"
    [ "$code" -eq 0 ] || exit "$code"
}

# Sets `code` to the exit code of the rank that failed first, `first` to srun's line about it, and `suspects` to its node:
# srun ends the other ranks, whose codes are less specific, and returns the highest of all. A run that knows the faulty
# node better prints a line of its own; the doctor prints one for each bad node.
# Sets `node` to the first suspect, and `why` to the line with the cause.
first_failure() {
    local line named
    line=$(grep -m1 -E '^srun: error: [^ ]+: tasks? [^:]+: ' "$said" || true)
    if [[ $line =~ ^srun:\ error:\ (([^:]+):\ tasks?\ [^:]+:\ (Exited with exit code ([0-9]+))?.*) ]]; then
        first=${BASH_REMATCH[1]} suspects=${BASH_REMATCH[2]} code=${BASH_REMATCH[4]:-$code}
        node=$suspects
    fi
    named=$(sed -nE 's/^foveal: suspect node ([^ :,]+).*/\1/p' "$said" | awk '!seen[$0]++')
    if [ "$code" -ne 6 ]; then
        named=${named%%$'\n'*}  # ranks that lost each other name further nodes
    fi
    if [ -n "$named" ]; then
        node=${named%%$'\n'*}
    fi
    if [ -n "$named" ] || [ -n "${only_named:-}" ]; then
        suspects=$named
    fi
    # The last line before srun's first error that looks like an error, else the last line, else the first line after it.
    why=$(awk '
        /^srun: error: [^ ]+: tasks? / { ended = 1; next }
        /^(srun: |slurmstepd[^ ]*: error: \*\*\*|[[:space:]]*$)/ { if (/^srun: error: / && !ended) srun = $0; next }
        ended { if (late == "") late = $0; next }
        { last = $0 }
        /^(foveal: |slurmstepd[^ ]*: error: |[A-Za-z_.]+(Error|Exception)(:|$))|[Nn]o (such|module)|not found/ { error = $0 }
        END { print error != "" ? error : (last != "" ? last : (srun != "" ? srun : late)) }' "$said")
    why=${why:-${first:-exit code $code}}
    why=${why:0:400}
}

# The exit codes are those of foveal/errors.py, unless the program never ran: then the code is an errno of Linux.
start_again_unless_futile() {
    local futile='' ledger='' failed=0 early=0 meaning=$code
    if grep -qE '^slurmstepd[^ ]*: error: execve\(\)' "$said"; then
        meaning=never_ran
    fi
    count_starts
    case $meaning in
        2) futile="another start would make the same mistake; it is said above" ;;
        3) futile="the training diverged, and would again" ;;
        4) futile="another attempt has taken over the run" ;;
        5) ;;  # storage that does not answer may be away for a night
        6) futile=$(in_the_way) ;;
        7) futile="several starts in a row got no further$(where_they_failed "$((failed - 1))" 1)" ;;
        *)
            if [ "$early" -gt "${#pauses[@]}" ]; then
                futile="$early starts in a row failed before any attempt began$(where_they_failed "$early" 0)"
            fi
            ;;
    esac
    if [ -n "$futile" ]; then
        call_off_restart
    else
        keep_counts
    fi
    if [ -z "$futile" ] && [ "$failed" -gt "$max_restarts" ]; then
        futile="$failed starts in a row got no further (max_restarts in slurm/environment.sh)$(where_they_failed "$failed" 0)"
    elif [ -z "$futile" ]; then
        pause
        going_on || futile="the job was cancelled, or is requeued already"
    fi
    if [ -n "$futile" ]; then
        [ "${mistake_is_said:-}$meaning" = yes2 ] || echo "foveal: exit code $code, not requeued: $futile" >&2
    elif asked_slurm requeue "$job"; then
        echo "foveal: exit code $code, requeued; first to fail: ${first:-$node: $why}" >&2
        exclude
    else
        echo "foveal: exit code $code, not requeued: Slurm refused; submit it again" >&2
    fi
}

# Sets `ledger` to the record of the starts so far: the furthest step of each run (reached STEP RUN), and the latest failed
# starts in a row since then (failed RESTART NODE BEGUN WHY), this one included; `failed` to their number, and `early` to
# the number of the latest without an attempt. Only a step beyond the furthest is progress, so that a run that is set back
# does not restart for ever. A start missing between two entries ended differently: it saved, or its node was lost.
count_starts() {
    local before=$counts begun=no restart=${SLURM_RESTART_COUNT:-0}
    if [ "$restart" -eq 0 ]; then
        rm -f "$counts"  # of a job that had this number before
    fi
    [ -f "$before" ] || before=/dev/null
    if grep -qE '^attempt [0-9]+ begins at step ' "$said"; then
        begun=yes
    fi
    ledger=$(awk '
        part == "before" && $1 == "reached" { step = $2; sub(/^reached [0-9]+ /, ""); best[$0] = step; next }
        part == "before" { failures = failures $0 "\n"; last = $2; next }
        /^attempt [0-9]+ begins at step [0-9]+: / {
            step = $6 + 0
            sub(/^[^:]*: /, "")
            if (!($0 in best) || step > best[$0]) { best[$0] = step; failures = "" }
        }
        END { for (run in best) print "reached", best[run], run; if (last == restart - 1) printf "%s", failures }
    ' restart="$restart" part=before "$before" part=now "$said")
    ledger+=${ledger:+$'\n'}"failed $restart $node $begun $why"
    failed=$(grep -c '^failed ' <<<"$ledger")
    early=$(awk '$1 == "failed" { early = $4 == "no" ? early + 1 : 0 } END { print early + 0 }' <<<"$ledger")
}

# Stores the ledger. If that fails, every restart of the job counts as one without progress.
keep_counts() {
    if ! { mkdir -p "${counts%/*}" && echo "$ledger" >"$counts.new" && mv "$counts.new" "$counts"; }; then
        failed=$((${SLURM_RESTART_COUNT:-0} + 1))
    fi
}

# where_they_failed LAST WITHOUT: node and cause of the LAST failed starts, without the newest WITHOUT of them.
where_they_failed() {
    awk '$1 == "failed"' <<<"$ledger" | head -n "-$2" | tail -n "$1" | awk '
        { same += $3 == node; node = $3; sub(/^[^ ]+ [^ ]+ [^ ]+ [^ ]+ /, ""); why = $0 }
        END { if (NR) printf ", %s first on %s: %s", (NR > 1 && same == NR - 1) ? "each" : "the last", node, why }'
}

# Waits before another start, longer after more failures; not if Slurm is ending the job.
pause() {
    local last=$((${#pauses[@]} - 1)) seconds
    if [ "$last" -lt 0 ] || [ "$(of_job JobState)" != RUNNING ] || [ "$(of_job PreemptTime)" != None ]; then
        return 0
    fi
    seconds=${pauses[failed > last ? last : failed - 1]}
    trap 'seconds=0' TERM
    while [ "$seconds" -gt 0 ]; do
        sleep 1
        seconds=$((seconds - 1))
    done
    trap '' TERM
}

# Another rank may have requeued the job when this one failed; the next start would fail in the same way. A shell whose
# attempt was superseded must not cancel the job that runs elsewhere.
call_off_restart() {
    if [ "$code" -ne 4 ] && [ "$(of_job JobState)" != RUNNING ] &&
        [ "$(of_job Restarts)" = $((${SLURM_RESTART_COUNT:-0} + 1)) ]; then
        scancel "$job" || true
    fi
    rm -f "$counts"
}

# A cancelled job is not RUNNING any more, and neither is one that is requeued already. A job that Slurm ended at its time
# limit, before it could save, is not RUNNING either, but must continue.
going_on() {
    [ "$(of_job JobState)" = RUNNING ] || [ "$(of_job Reason)" = TimeLimit ]
}

# Excludes the suspects from the next start on, if environment.sh asks for that and enough nodes are left. Slurm refuses
# this while a job runs, and keeps it for all later restarts.
exclude() {
    local list
    if [ "$exclude_bad_node" != 1 ] || [ -z "$suspects" ] || ! list=$(without_suspects); then
        return 0
    elif asked_slurm update "JobId=$job" "ExcNodeList=$list"; then
        echo "foveal: excluded from now on: ${suspects//$'\n'/, }; scontrol update JobId=$job ExcNodeList= takes that back" >&2
    fi
}

# Prints why a job that the doctor stopped cannot continue without the named nodes; nothing if it can.
in_the_way() {
    if [ -z "$suspects" ]; then
        echo "no node in particular is to blame; what is wrong is said above"
    elif [ "$exclude_bad_node" != 1 ]; then
        echo "a bad node is named above; with FOVEAL_EXCLUDE_BAD_NODE=1 the job goes on without it"
    elif ! without_suspects >/dev/null; then
        echo "too few nodes are left without those named above"
    fi
}

# Prints the job's list of excluded nodes with the suspects added, if enough nodes are left for the job.
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

# of_job KEY: the value in `scontrol show job`; keys before Command= only, which quotes the user's command.
of_job() {
    asked_slurm show job --oneliner "$job" | tr ' ' '\n' | sed -n "1,/^Command=/s/^$1=//p"
}

# asked_slurm ARGUMENTS OF SCONTROL: retries while the controller does not answer, five minutes in all.
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
