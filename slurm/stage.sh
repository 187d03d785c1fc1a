# shellcheck shell=bash
# What the three job scripts have in common; sourced by them in the folder where sbatch was called.

source slurm/environment.sh
declare -p pauses >/dev/null 2>&1 || pauses=(10 30 90)

export PYTHONUNBUFFERED=1
# sbatch --export=NONE, or one that names variables, is about this shell: what it has now, PATH above all, every rank gets.
export SLURM_EXPORT_ENV=ALL
# From 22.05 on srun does not take --cpus-per-task from the job: where tasks are bound, every rank would have one CPU.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}

# What Slurm's commands call this job. One task of an array has the number of the whole array as its SLURM_JOB_ID: to
# requeue that would start every task again.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# How many starts came to nothing has to outlast a requeue to another node. Slurm counts all restarts alike, the job's
# comment is the user's, the log may be /dev/null, and the run directory is not known where Python does not start; but the
# folder of sbatch is seen by every node, or this file would not have been read.
counts=runs/.restarts-${SLURM_CLUSTER_NAME:-slurm}-$job

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

# check_settings MODULE
# A mistake (a setting, missing shards, a batch that these ranks do not divide) ends the job here, with one sentence and code 2.
check_settings() {
    local mistake_is_said=yes node=${SLURMD_NODENAME:-unknown}
    watched "${check[@]}" -m "$1" "${arguments[@]}" --check --ranks "$SLURM_NTASKS"
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
# Runs a module as one task of srun per rank. A run that was asked to leave has saved, and ends with 0. It has asked Slurm
# for another start itself; or it heard a SIGTERM for which Slurm has no reason, and this shell asks, which knows whether
# srun sent it because another rank had failed. When a node is lost, Slurm requeues the job by itself and kills this shell.
run_ranks() {
    local node=unknown
    watched srun --kill-on-bad-exit=1 --wait=300 "${srun_options[@]}" "${ranks[@]}" -m "$@"
    if [ -z "${only_named:-}" ] && [ -f "$counts" ] && going_on; then
        rm -f "$counts"  # the run is finished
    fi
}

# watched COMMAND
# Runs it. If it fails, ends with its exit code, and asks Slurm for another start where one can help.
watched() {
    local said errors tee code=0 suspects='' first=''
    said=$(mktemp)
    # Slurm's TERM is for the ranks, which save and leave: this shell outlives them to decide what comes next.
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

# Sets `code` to the exit code of the rank that failed first, `first` to what srun says of it, and `suspects` to the node
# where that was: srun ends the other ranks, whose codes say less, and returns the highest of all. A run that knows
# better which node is to blame says so in a line of its own; the examination has one for each bad node.
# Sets `node` to the first of them, and `why` to the line that tells the cause.
first_failure() {
    local line named
    line=$(grep -m1 -E '^srun: error: [^ ]+: tasks? [^:]+: ' "$said" || true)
    if [[ $line =~ ^srun:\ error:\ (([^:]+):\ tasks?\ [^:]+:\ (Exited with exit code ([0-9]+))?.*) ]]; then
        first=${BASH_REMATCH[1]} suspects=${BASH_REMATCH[2]} code=${BASH_REMATCH[4]:-$code}
        node=$suspects
    fi
    named=$(sed -nE 's/^foveal: suspect node ([^ :,]+).*/\1/p' "$said" | awk '!seen[$0]++')
    if [ "$code" -ne 6 ]; then
        named=${named%%$'\n'*}  # ranks that lost one another blame further ones
    fi
    if [ -n "$named" ]; then
        node=${named%%$'\n'*}
    fi
    if [ -n "$named" ] || [ -n "${only_named:-}" ]; then
        suspects=$named
    fi
    # Before srun tells of the first end: the last line that looks like an error, else the last line; else what came late.
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

# The exit codes are those of foveal/errors.py; unless the program never ran: then it is a number of Linux's for the reason.
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

# Sets `ledger` to what is known of the starts so far: how far each run had come (reached STEP RUN), and the last starts in
# a row that failed since then (failed RESTART NODE BEGUN WHY), this one included; `failed` to their number, and `early` to
# how many of the last had no attempt. Only a step that was not reached before is progress: a run that is set back may not go
# in circles. A start that is not in the ledger between two that are ended otherwise: it left, or its node was lost.
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

# Writes the ledger down. Where that cannot be, every restart of the job counts, as if none had got further.
keep_counts() {
    if ! { mkdir -p "${counts%/*}" && echo "$ledger" >"$counts.new" && mv "$counts.new" "$counts"; }; then
        failed=$((${SLURM_RESTART_COUNT:-0} + 1))
    fi
}

# where_they_failed LAST WITHOUT: the node and the cause of so many starts, without the very last ones.
where_they_failed() {
    awk '$1 == "failed"' <<<"$ledger" | head -n "-$2" | tail -n "$1" | awk '
        { same += $3 == node; node = $3; sub(/^[^ ]+ [^ ]+ [^ ]+ [^ ]+ /, ""); why = $0 }
        END { if (NR) printf ", %s first on %s: %s", (NR > 1 && same == NR - 1) ? "each" : "the last", node, why }'
}

# Waits before another start, the longer the more of them came to nothing; not where Slurm wants the job to end.
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

# Another rank may have asked for a start when this one failed; it would meet the same mistake. A shell whose attempt was
# superseded says nothing of the job that goes on elsewhere.
call_off_restart() {
    if [ "$code" -ne 4 ] && [ "$(of_job JobState)" != RUNNING ] &&
        [ "$(of_job Restarts)" = $((${SLURM_RESTART_COUNT:-0} + 1)) ]; then
        scancel "$job" || true
    fi
    rm -f "$counts"
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
