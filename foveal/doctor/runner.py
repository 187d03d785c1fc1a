"""The course of a preflight: every rank by itself, all ranks together, one verdict."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer

from foveal.distributed.preflight import PreflightGroup, exit_preflight, join_preflight, node_names_by_rank
from foveal.doctor import node_checks, run_checks
from foveal.doctor.report import RankReport, classify_error
from foveal.doctor.table import format_node_table
from foveal.doctor.verdict import judge_reports
from foveal.errors import BadNodeError, FovealError
from foveal.forecast.cli import import_stage
from foveal.timeouts import call_with_timeout
from foveal.training.cli import Stage, load_config

AnyStage = Stage[Any, Any]

RANK_CHECKS_TIMEOUT = 28.0  # seconds until every rank has looked at itself
COLLECTIVES_TIMEOUT = 7.0  # seconds for the collectives
PREFLIGHT_TIMEOUT = 60.0  # seconds after which whatever hangs is ended
_TIMEOUT_MARGIN = 2.0  # seconds between what ranks wait for and what rank 0 does


@dataclass(frozen=True)
class PreflightOptions:
    """What is to be examined: a stage's run, if there is one to come; and what is asked of the ranks.

    slowest: the share of its peers' median rate that will do; joining: seconds until every rank must have come.
    """

    stage: str | None
    config: str
    overrides: list[str]
    min_relative_rate: float
    join_timeout: float


def run_preflight(options: PreflightOptions) -> None:
    """Be one rank of a preflight, and end this process with its verdict."""
    stage = None if options.stage is None else import_stage(options.stage)  # imported before any clock runs
    with join_preflight(options.join_timeout, PREFLIGHT_TIMEOUT) as here:
        exit_preflight(here, _run_checks(here, stage, options))


def _run_checks(group: PreflightGroup, stage: AnyStage | None, options: PreflightOptions) -> int:
    """The exit code, the same on every rank that lives to hear it."""
    report = _check_rank(group, stage, options)
    group.post_report("alone", report.to_dict())
    if group.launch_env.rank == 0:
        reports = group.gather_reports("alone", RANK_CHECKS_TIMEOUT)
        group.announce("go", {"time": time.time(), "all": len(reports) == group.launch_env.world_size})
    go = group.wait_for_announcement("go", RANK_CHECKS_TIMEOUT + _TIMEOUT_MARGIN)
    if go is None:
        return _report_lost_rank0(group)
    report.facts["skew"] = time.time() - go["time"]
    if go["all"]:
        _check_collectives(group, report)
    group.post_report("together", report.to_dict())
    until = RANK_CHECKS_TIMEOUT + _TIMEOUT_MARGIN + COLLECTIVES_TIMEOUT
    if group.launch_env.rank == 0:
        found = {
            rank: RankReport.from_dict(tree)
            for rank, tree in (reports | group.gather_reports("together", until)).items()
        }
        group.announce(
            "verdict",
            _print_verdict(group, found, options, hung_ranks=set(reports) - set(group.gather_reports("together", 0.0))),
        )
    verdict = group.wait_for_announcement("verdict", until + _TIMEOUT_MARGIN)
    return _report_lost_rank0(group) if verdict is None else verdict


def _check_rank(group: PreflightGroup, stage: AnyStage | None, options: PreflightOptions) -> RankReport:
    """Everything that a rank can find out by itself, each within its own limit."""
    report = RankReport(group.node, group.launch_env.rank)
    subjects: list[run_checks.PlannedRun] = []
    first = group.launch_env.local_rank == 0

    def settings(_report: RankReport) -> None:
        assert stage is not None
        cfg = load_config(stage.config_class, stage.name, options.config, options.overrides)
        subjects.append(run_checks.PlannedRun(stage, stage.build_plan(cfg, group.launch_env.world_size)))

    def attempt(what: str, limit: float, check: Callable[[RankReport], None]) -> None:
        own = RankReport(report.node, report.rank)
        limit = max(0.1, min(limit, RANK_CHECKS_TIMEOUT - _TIMEOUT_MARGIN - group.elapsed_seconds))
        group.post_status(what)
        try:
            call_with_timeout(limit, lambda: check(own))
        except TimeoutError:
            report.add_fault("reach", f"rank {report.rank}: {what} did not end within {limit:.0f} s")
            return
        except FovealError as error:
            own.add_fault(classify_error(error), str(error))
        except Exception as error:  # noqa: BLE001 - whatever a broken node raises is the finding
            own.add_fault("node", f"rank {report.rank}: {what} failed ({type(error).__name__}: {error})")
        report.facts |= own.facts
        report.faults += own.faults

    attempt("counting its GPUs", 10, lambda own: node_checks.check_gpu_allocation(own, group.launch_env))
    attempt("looking at its device", 15, lambda own: node_checks.check_device(own, group.device))
    attempt("multiplying matrices", 15, lambda own: node_checks.measure_matmul_rates(own, group.device))
    if first:
        attempt("looking at /dev/shm", 5, node_checks.check_shared_memory)
    attempt("looking at its limits", 5, node_checks.check_open_file_limit)
    attempt("looking at its software", 10, run_checks.check_software_versions)
    if stage is None:
        return report
    attempt("reading settings and manifest", RANK_CHECKS_TIMEOUT, settings)
    for subject in subjects:
        attempt(
            "importing the engine",
            RANK_CHECKS_TIMEOUT,
            lambda own, cfg=subject.plan.cfg.engine: run_checks.check_engine_import(own, cfg),
        )
        attempt("reading shards", 15, lambda own, subject=subject: run_checks.check_shards(own, subject))
        if first:
            attempt("writing to the run's disk", 20, lambda own, subject=subject: run_checks.check_disk(own, subject))
        if group.launch_env.rank == 0:
            attempt(
                "reaching MLflow",
                8,
                lambda own, uri=subject.plan.cfg.tracking.uri: run_checks.check_tracking_server(own, uri),
            )
    return report


def _check_collectives(group: PreflightGroup, report: RankReport) -> None:
    group.post_status("all-reduce")
    try:
        report.facts |= group.benchmark_all_reduce(COLLECTIVES_TIMEOUT - _TIMEOUT_MARGIN)
    except FovealError as error:
        report.add_fault("reach", str(error))


def _print_verdict(
    group: PreflightGroup, reports_by_rank: dict[int, RankReport], options: PreflightOptions, hung_ranks: set[int]
) -> int:
    """Print what came of it; the exit code."""
    placed = node_names_by_rank(group.launch_env.world_size)
    silent: dict[int, tuple[str, str]] = {}
    for rank in sorted(set(range(group.launch_env.world_size)) - set(reports_by_rank) | hung_ranks):
        words = group.last_status(rank)
        if words is None:
            silent[rank] = (
                placed[rank] if placed else "",
                f"rank {rank} did not come within {options.join_timeout:.0f} s",
            )
        else:
            silent[rank] = (words[0], f"rank {rank} said nothing more after it began {words[1]}")
    reports = [reports_by_rank[rank] for rank in sorted(reports_by_rank)]
    verdict = judge_reports(reports, silent, options.min_relative_rate)
    for line in format_node_table(reports, silent, verdict.bad_nodes):
        typer.echo(line)
    links = [each.facts["bandwidth"] for each in reports if "bandwidth" in each.facts]
    if links:
        delay = max(each.facts["latency"] for each in reports if "latency" in each.facts)
        typer.echo(
            f"all-reduce among {len(links)} ranks: right, {min(links) / 1e9:.3g} GB/s, {delay * 1e6:.0f} us for 8 bytes"
        )
    for sentence in verdict.sentences:
        typer.echo(sentence)
    for name in verdict.bad_nodes:
        why = verdict.reasons[name]
        typer.echo(f"foveal: suspect node {name}: {why}", err=True)
    if verdict.exit_code == BadNodeError.exit_code:
        typer.echo(f"bad nodes: {','.join(verdict.bad_nodes) or 'unknown'}")
    return verdict.exit_code


def _report_lost_rank0(group: PreflightGroup) -> int:
    """Rank 0 is gone: the others say so."""
    nodes = node_names_by_rank(group.launch_env.world_size)
    where = nodes[0] if nodes else "its node"
    typer.echo(
        f"foveal: suspect node {where}: rank 0 said nothing more, as rank {group.launch_env.rank} sees it", err=True
    )
    return BadNodeError.exit_code
