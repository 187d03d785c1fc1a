"""The preflight of `foveal doctor`: checks on each rank, collectives of all ranks, one verdict."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer

from foveal.data.storage.listing import list_files_if
from foveal.distributed.launcher import LaunchEnv
from foveal.distributed.preflight import PreflightGroup, exit_preflight, join_preflight
from foveal.doctor import node_checks, run_checks
from foveal.doctor.report import RankReport, classify_error
from foveal.doctor.table import format_node_table
from foveal.doctor.verdict import judge_reports
from foveal.errors import BadNodeError, FovealError
from foveal.slurm import slurm_nodes_by_rank
from foveal.timeouts import call_with_timeout
from foveal.training.cli import load_config
from foveal.training.run_directory import keep_rules_of_run
from foveal.training.stage import Stage, import_stage

AnyStage = Stage[Any, Any]

_TIMEOUT_MARGIN = 2.0  # seconds that other ranks wait longer than rank 0


@dataclass(frozen=True)
class PreflightOptions:
    """Options of `foveal doctor`: the run to check, stage None without one, and the limits for ranks.

    ``min_relative_matmul_rate``: lowest accepted rate, as a fraction of the other ranks' median; ``join_timeout``: seconds.
    """

    stage: str | None
    config: str
    overrides: list[str]
    min_relative_matmul_rate: float
    join_timeout: float


def run_preflight_and_exit(options: PreflightOptions) -> None:
    """Run one rank of a preflight, and end this process with the verdict's exit code."""
    stage = None if options.stage is None else import_stage(options.stage)
    if stage is not None:
        stage.import_functions()  # torch and timm, before any clock runs
    with join_preflight(options.join_timeout) as group:
        exit_preflight(group, _run_checks(group, stage, options))


def _run_checks(group: PreflightGroup, stage: AnyStage | None, options: PreflightOptions) -> int:
    """Return the verdict's exit code, equal on every rank that reads the verdict."""
    timeouts = group.timeouts
    report = _check_rank(group, stage, options)
    group.post_report("alone", report.to_dict())
    if group.launch_env.rank == 0:
        reports = group.gather_reports_until("alone", timeouts.rank_checks)
        group.announce("go", {"time": time.time(), "all": len(reports) == group.launch_env.world_size})
    go = group.wait_for_announcement("go", timeouts.rank_checks + _TIMEOUT_MARGIN)
    if go is None:
        return _report_lost_rank0(group)
    report.facts["skew"] = time.time() - go["time"]
    if go["all"]:
        _check_collectives(group, report)
    group.post_report("together", report.to_dict())
    deadline = timeouts.rank_checks + timeouts.collectives + 2 * _TIMEOUT_MARGIN
    if group.launch_env.rank == 0:
        all_reports = {
            rank: RankReport.from_dict(data)
            for rank, data in (reports | group.gather_reports_until("together", deadline)).items()
        }
        hung_ranks = set(reports) - set(group.gather_reports_until("together", 0.0))
        group.announce("verdict", _print_verdict(group, all_reports, options, hung_ranks))
    exit_code = group.wait_for_announcement("verdict", deadline + _TIMEOUT_MARGIN)
    return _report_lost_rank0(group) if exit_code is None else exit_code


def _check_rank(group: PreflightGroup, stage: AnyStage | None, options: PreflightOptions) -> RankReport:
    """Run the checks that need no other rank, each with a time limit of its own."""
    report = RankReport(group.node, group.launch_env.rank)
    planned_runs: list[run_checks.PlannedRun] = []
    first_on_node, timeout = group.launch_env.local_rank == 0, group.timeouts.rank_checks
    world_size = group.launch_env.world_size

    def run_check(activity: str, limit: float, check: Callable[[RankReport], None]) -> None:
        partial = RankReport(report.node, report.rank)  # merged only if the check ends: its thread may still write
        seconds_left = timeout - _TIMEOUT_MARGIN - group.elapsed_seconds
        limit = max(0.1, min(limit, seconds_left))
        group.post_status(activity)
        try:
            call_with_timeout(limit, lambda: check(partial))
        except TimeoutError:
            end = (
                f"did not end within {limit:.0f} s" if seconds_left >= 1 else "had no time: the checks before were slow"
            )
            report.add_fault("reach", f"rank {report.rank}: {activity} {end}")
            return
        except FovealError as error:
            partial.add_fault(classify_error(error), str(error))
        except Exception as error:  # noqa: BLE001 - any error of a broken node is a fault
            partial.add_fault("node", f"rank {report.rank}: {activity} failed ({type(error).__name__}: {error})")
        report.facts |= partial.facts
        report.faults += partial.faults

    run_check("counting its GPUs", 10, lambda partial: node_checks.check_gpu_allocation(partial, group.launch_env))
    run_check("looking at its device", 15, lambda partial: node_checks.check_device(partial, group.device))
    run_check("multiplying matrices", 15, lambda partial: node_checks.measure_matmul_rates(partial, group.device))
    if first_on_node:
        run_check("looking at /dev/shm", 5, node_checks.check_shared_memory)
    run_check("looking at its limits", 5, lambda partial: node_checks.check_limits(partial, world_size))
    run_check("looking at its software", 10, run_checks.record_software_versions)
    if stage is None:
        return report

    def plan_run(_report: RankReport) -> None:
        planned_runs.append(_plan_run(stage, options, group.launch_env))

    run_check("reading settings and manifest", timeout, plan_run)
    for run in planned_runs:
        engine, uri = run.plan.cfg.engine, run.plan.cfg.tracking.uri
        run_check(
            "importing the engine",
            timeout,
            lambda partial, engine=engine: run_checks.check_engine_import(partial, engine),
        )
        run_check("reading shards", 15, lambda partial, run=run: run_checks.check_some_shard_heads(partial, run))
        if first_on_node:
            run_check(
                "writing to the run's disk", 20, lambda partial, run=run: run_checks.check_checkpoint_disk(partial, run)
            )
        if group.launch_env.rank == 0:
            run_check("reaching MLflow", 8, lambda partial, uri=uri: run_checks.check_tracking_server(partial, uri))
    return report


def _plan_run(stage: AnyStage, options: PreflightOptions, launch_env: LaunchEnv) -> run_checks.PlannedRun:
    """Return the plan of the run; as in the run, the first rank of each node looks at the files of the data set."""
    cfg = keep_rules_of_run(load_config(stage.config_class, stage.name, options.config, options.overrides))
    with list_files_if(launch_env.local_rank == 0):
        return run_checks.PlannedRun(stage, stage.functions.build_plan(cfg, launch_env.world_size))


def _check_collectives(group: PreflightGroup, report: RankReport) -> None:
    try:
        group.post_status("connecting to the other ranks")
        group.connect_ranks()
        group.post_status("all-reduce")
        report.facts |= group.check_all_reduce_rates()
    except FovealError as error:
        report.add_fault(classify_error(error), str(error))


def _print_verdict(
    group: PreflightGroup, reports_by_rank: dict[int, RankReport], options: PreflightOptions, hung_ranks: set[int]
) -> int:
    """Print the table and the verdict on rank 0. Return the exit code."""
    nodes_by_rank = slurm_nodes_by_rank(group.launch_env.world_size)
    silent: dict[int, tuple[str, str]] = {}
    for rank in sorted(set(range(group.launch_env.world_size)) - set(reports_by_rank) | hung_ranks):
        last_status = group.last_node_and_status(rank)
        if last_status is None:
            node = nodes_by_rank[rank] if nodes_by_rank else ""
            silent[rank] = (node, f"rank {rank} did not come within {options.join_timeout:.0f} s")
        else:
            node, activity = last_status
            silent[rank] = (node, f"rank {rank} said nothing more after it began {activity}")
    reports = [reports_by_rank[rank] for rank in sorted(reports_by_rank)]
    verdict = judge_reports(reports, silent, options.min_relative_matmul_rate)
    for line in format_node_table(reports, silent, verdict.bad_nodes):
        typer.echo(line)
    bandwidths = [report.facts["bandwidth"] for report in reports if "bandwidth" in report.facts]
    if bandwidths:
        latency = max(report.facts["latency"] for report in reports if "latency" in report.facts)
        typer.echo(
            f"all-reduce among {len(bandwidths)} ranks: correct, {min(bandwidths) / 1e9:.3g} GB/s, "
            f"{latency * 1e6:.0f} us for 8 bytes"
        )
    for sentence in verdict.sentences:
        typer.echo(sentence)
    for node, reason in verdict.reasons.items():
        typer.echo(f"foveal: suspect node {node}: {reason}", err=True)
    if verdict.exit_code == BadNodeError.exit_code:
        typer.echo(f"bad nodes: {','.join(verdict.bad_nodes) or 'unknown'}")
    return verdict.exit_code


def _report_lost_rank0(group: PreflightGroup) -> int:
    """Report that rank 0 did not answer. Return the exit code."""
    nodes_by_rank = slurm_nodes_by_rank(group.launch_env.world_size)
    node = nodes_by_rank[0] if nodes_by_rank else "its node"
    typer.echo(
        f"foveal: suspect node {node}: rank 0 said nothing more, as rank {group.launch_env.rank} sees it", err=True
    )
    return BadNodeError.exit_code
