# Functions that the .sbatch scripts share. They set `scripts`, the folder of this file, and source it; edit env.sh instead.
# shellcheck shell=bash disable=SC2317,SC2034

unset SLURM_EXPORT_ENV  # set by `sbatch --export=NONE`; the ranks would start without PATH and the exports of env.sh
ESVIT_CONTAINER=()
# shellcheck source=env.sh
source "${ESVIT_ENV:-$scripts/env.sh}"
if [ -z "${ESVIT_PYTHON:-}" ]; then
  ESVIT_PYTHON=$scripts/../.venv/bin/python
  [ -x "$ESVIT_PYTHON" ] || ESVIT_PYTHON=python3
fi

job=$SLURM_JOB_ID  # for an array, the element's id: the plain id of the last element means the whole array
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
# A port below those that Linux gives to outgoing connections, and another one after each requeue.
MASTER_PORT=$((20000 + (SLURM_JOB_ID + 1009 * ${SLURM_RESTART_COUNT:-0}) % 12000))
# Seconds before the time limit at which the signal comes; the run warns when a save takes longer.
ESVIT_SIGNAL_LEAD=$(sed -n 's/^#SBATCH --signal=B:USR1@\([0-9]*\).*/\1/p' "$0")
export MASTER_ADDR MASTER_PORT ESVIT_SIGNAL_LEAD

requeued=  # 1 once this script or Slurm has requeued the job

say() { echo "$(date +%T) job $job: $*"; }

esvit() { ${ESVIT_CONTAINER[@]+"${ESVIT_CONTAINER[@]}"} "$ESVIT_PYTHON" -u -m esvit_scale "$@"; }

# keep_records DIR: make DIR the folder for this job's starts, failures and logs of the ranks; create it when needed.
keep_records() {
  records=$1
  export ESVIT_RANK_LOGS=$records/$job
  mkdir -p "$ESVIT_RANK_LOGS"
  rm -f "$ESVIT_RANK_LOGS"/exit-*
  printf '%s\t%s\t%s\t%s\n' "$(date -u +%FT%TZ)" "$job" "${SLURM_RESTART_COUNT:-0}" "$SLURM_JOB_NODELIST" \
    >>"$records/starts.tsv"
  trap 'note_end $?' EXIT
  say "start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST; rank 0 writes here, the others to $ESVIT_RANK_LOGS"
}

# note_end CODE: record how the job ended for good, for `slurm status` and `sweep status`: Slurm may forget it.
note_end() {
  [ -z "$requeued" ] && [ "$term" = 0 ] || return 0
  printf '%s\t%s\t%s\n' "$(date -u +%FT%TZ)" "$job" "$1" >>"$records/ended.tsv"
}

# step [SRUN OPTIONS] -- COMMAND: run `esvit-scale COMMAND` on every rank; leave the exit code in rc.
# srun runs in the background, because a shell does not handle signals while it waits for a foreground command. on_usr1
# passes USR1 (the time limit is near) on to the ranks. TERM means scancel, or preemption without grace; Slurm itself then
# ends the ranks. (Never send TERM to srun: it kills the ranks at once.)
usr1=0 term=0 rc=0 pid=
hand_on() { kill -USR1 "$pid" 2>/dev/null || true; }  # the step may have ended just now
on_usr1() { hand_on; }
trap 'near_the_limit' USR1
near_the_limit() {
  if [ -z "$shortened" ] && shortened=$(too_early) && [ "$shortened" != 0 ]; then
    say "the signal came ${ESVIT_SIGNAL_LEAD:-?} s before the limit, which is the whole time of this job: saving only in $shortened s"
    { sleep "$shortened"; kill -USR1 $$; } >/dev/null 2>&1 &
  else
    # Do not use `return` here: in a trap it returns the status of the interrupted command, and `set -e` would end the job.
    usr1=1
    say "the time limit is near"
    [ -z "$pid" ] || on_usr1
  fi
}

# Print the seconds to wait before saving when Slurm's signal came at the start of the job, because its lead is about as
# long as the time limit; else print 0. Without the wait such a job would save and requeue itself at once, for ever.
shortened=
too_early() {
  local fields begin end now
  fields=$(scontrol show job -o "$job" | sed -n 1p)
  begin=$(date -d "$(sed -n 's/.* StartTime=\([^ ]*\).*/\1/p' <<<"$fields")" +%s 2>/dev/null) || { echo 0; return 0; }
  end=$(date -d "$(sed -n 's/.* EndTime=\([^ ]*\).*/\1/p' <<<"$fields")" +%s 2>/dev/null) || { echo 0; return 0; }
  now=$(date +%s)
  # Slurm sends the signal up to a minute early; a signal sent by hand comes with more time left.
  if [ $((end - now)) -le $((${ESVIT_SIGNAL_LEAD:-0} + 90)) ] && [ $((4 * (now - begin))) -lt $((end - begin)) ]; then
    echo $(((begin + end) / 2 - now))
  else
    echo 0
  fi
}
trap 'term=1' TERM
step() {
  local options=()
  [ "$usr1" = 0 ] || requeue "no time is left"
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" ${options[@]+"${options[@]}"} \
    bash "$scripts/rank.sh" ${ESVIT_CONTAINER[@]+"${ESVIT_CONTAINER[@]}"} "$ESVIT_PYTHON" -u -m esvit_scale "$@" &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done  # a signal interrupts wait
  rc=0; wait "$pid" || rc=$?
  pid=
  [ "$rc" = 0 ] || blame
}

# Find the rank whose failure ended the step. srun returns the largest exit code, often that of a rank that was ended
# because another had failed. The program's own codes (2, 3) come first, then those that call for a restart, then the
# earliest failure.
blame() {
  local line
  line=$(cat "$ESVIT_RANK_LOGS"/exit-* 2>/dev/null | sort -n | awk '
    { if (!first) first = $0 }
    $2 == 2 || $2 == 3 { if (!verdict) verdict = $0 }
    $2 == 75 || ($2 > 128 && $2 != 130 && $2 != 143) { if (!lost) lost = $0 }
    END { print verdict ? verdict : (lost ? lost : first) }') || true  # no file: the ranks had not started
  rm -f "$ESVIT_RANK_LOGS"/exit-*
  [ -n "$line" ] || return 0
  read -r _ rc line <<<"$line"
  say "$line failed (exit code $rc)"
}

# Check the nodes of a job before they work together, because one bad node slows or hangs all of them.
preflight() {
  [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ] && [ "$ESVIT_PREFLIGHT" = 1 ] || return 0
  local node
  on_usr1() { :; }
  rm -rf "$records/preflight"
  step --time=10 -- slurm preflight --shared "$records"
  on_usr1() { hand_on; }
  [ "$rc" != 0 ] || return 0
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    [ -e "$records/preflight/$node.txt" ] || say "preflight $node: it did not answer; without it: sbatch --exclude=$node …"
  done
  say "preflight failed (exit code $rc)"
  [ "$rc" != 1 ] || exit 1  # 1: a bad node was named; other failures may not happen again
  finish preflight
}

requeue() {
  [ "$term" = 0 ] || exit 143
  say "$1: requeued"
  requeued=1
  scontrol requeue "$job" && exit 0
  case $(scontrol show job -o "$job" 2>/dev/null | sed -n '1s/.* JobState=\([A-Z_]*\).*/\1/p') in
    PENDING | REQUEUED | REQUEUE_HOLD | COMPLETING | NODE_FAIL | PREEMPTED)
      say "Slurm has taken this job back by itself and starts it again"
      exit 0
      ;;
  esac
  requeued=
  say "this site refused the requeue; submit the same command again, it goes on from here"
  exit 75
}

# finish PROGRESS: end a job whose step returned rc. PROGRESS is a text that changes whenever the work has advanced.
finish() {
  if [ "$term" = 1 ]; then
    say "cancelled or preempted (exit code $rc)"
    exit "$rc"
  fi
  [ "$rc" != 0 ] || exit 0
  # A single task gets TERM only from outside: by preemption with grace, after which this script must requeue the job.
  [ "$rc" != 143 ] || [ "${SLURM_NTASKS:-1}" != 1 ] || requeue "preempted"
  local log shown=0
  for log in "$ESVIT_RANK_LOGS"/rank-*.log; do
    if [ -s "$log" ] && [ $((shown += 1)) -le 4 ]; then say "$log ends: $(tail -n 1 "$log")"; fi
  done
  # 75: the program found that a restart can help. Above 128: a rank was killed (lost node, memory, driver).
  if [ "$rc" != 75 ] && { [ "$rc" -le 128 ] || [ "$rc" = 130 ]; }; then exit "$rc"; fi
  local progress=$1 failures
  printf '%s\t%s\t%s\t%s\n' "$(date -u +%FT%TZ)" "$job" "$rc" "$progress" >>"$records/failures.tsv"
  failures=$(awk -F '\t' -v job="$job" -v progress="$progress" '$2 == job && $4 == progress' "$records/failures.tsv" | wc -l)
  if [ "$failures" -ge "$ESVIT_MAX_FAILURES" ]; then
    say "failed $failures times in a row at the same place ($progress): giving up; submitting again tries again"
    exit "$rc"
  fi
  requeue "a restart can help ($failures of $ESVIT_MAX_FAILURES failures at this place)"
}
