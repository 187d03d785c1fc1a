"""The course of a preflight: every rank by itself, all ranks together, one verdict."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer

from foveal.distributed.preflight import Meeting, leave, meeting, nodes_of_ranks
from foveal.doctor import node_checks, run_checks
from foveal.doctor.report import Report, kind_of
from foveal.doctor.table import lines_of
from foveal.doctor.verdict import judged
from foveal.errors import BadNode, FovealError
from foveal.forecast.cli import stage_named
from foveal.timeouts import within
from foveal.training.cli import Stage, load

AnyStage = Stage[Any, Any]

CHECKING = 28.0  # seconds until every rank has looked at itself
TOGETHER = 7.0  # seconds for the collectives
ENDING = 60.0  # seconds after which whatever hangs is ended
_MARGIN = 2.0  # seconds between what ranks wait for and what rank 0 does


@dataclass(frozen=True)
class Order:
    """What is to be examined: a stage's run, if there is one to come; and what is asked of the ranks.

    slowest: the share of its peers' median rate that will do; joining: seconds until every rank must have come.
    """

    stage: str | None
    config: str
    overrides: list[str]
    slowest: float
    joining: float


def examine(order: Order) -> None:
    """Be one rank of a preflight, and end this process with its verdict."""
    stage = None if order.stage is None else stage_named(order.stage)  # imported before any clock runs
    with meeting(order.joining, ENDING) as here:
        leave(here, _examined(here, stage, order))


def _examined(here: Meeting, stage: AnyStage | None, order: Order) -> int:
    """The exit code, the same on every rank that lives to hear it."""
    report = _alone(here, stage, order)
    here.report("alone", report.tree())
    if here.seat.rank == 0:
        reports = here.reports("alone", CHECKING)
        here.announce("go", {"time": time.time(), "all": len(reports) == here.seat.size})
    go = here.heard("go", CHECKING + _MARGIN)
    if go is None:
        return _orphaned(here)
    report.facts["skew"] = time.time() - go["time"]
    if go["all"]:
        _together(here, report)
    here.report("together", report.tree())
    until = CHECKING + _MARGIN + TOGETHER
    if here.seat.rank == 0:
        found = {rank: Report.of(tree) for rank, tree in (reports | here.reports("together", until)).items()}
        here.announce("verdict", _told(here, found, order, hung=set(reports) - set(here.reports("together", 0.0))))
    verdict = here.heard("verdict", until + _MARGIN)
    return _orphaned(here) if verdict is None else verdict


def _alone(here: Meeting, stage: AnyStage | None, order: Order) -> Report:
    """Everything that a rank can find out by itself, each within its own limit."""
    report = Report(here.node, here.seat.rank)
    subjects: list[run_checks.Subject] = []
    first = here.seat.local == 0

    def settings(_report: Report) -> None:
        assert stage is not None
        cfg = load(stage.config, stage.name, order.config, order.overrides)
        subjects.append(run_checks.Subject(stage, stage.plan(cfg, here.seat.size)))

    def attempt(what: str, limit: float, check: Callable[[Report], None]) -> None:
        own = Report(report.node, report.rank)
        limit = max(0.1, min(limit, CHECKING - _MARGIN - here.seconds))
        here.doing(what)
        try:
            within(limit, lambda: check(own))
        except TimeoutError:
            report.fault("reach", f"rank {report.rank}: {what} did not end within {limit:.0f} s")
            return
        except FovealError as error:
            own.fault(kind_of(error), str(error))
        except Exception as error:  # noqa: BLE001 - whatever a broken node raises is the finding
            own.fault("node", f"rank {report.rank}: {what} failed ({type(error).__name__}: {error})")
        report.facts |= own.facts
        report.faults += own.faults

    attempt("counting its GPUs", 10, lambda own: node_checks.gpus(own, here.seat))
    attempt("looking at its device", 15, lambda own: node_checks.device(own, here.device))
    attempt("multiplying matrices", 15, lambda own: node_checks.rates(own, here.device))
    if first:
        attempt("looking at /dev/shm", 5, node_checks.shared_memory)
    attempt("looking at its limits", 5, node_checks.limits)
    attempt("looking at its software", 10, run_checks.software)
    if stage is None:
        return report
    attempt("reading settings and manifest", CHECKING, settings)
    for subject in subjects:
        attempt("importing the engine", CHECKING, lambda own, cfg=subject.plan.cfg.engine: run_checks.engine(own, cfg))
        attempt("reading shards", 15, lambda own, subject=subject: run_checks.shards(own, subject))
        if first:
            attempt("writing to the run's disk", 20, lambda own, subject=subject: run_checks.disk(own, subject))
        if here.seat.rank == 0:
            attempt("reaching MLflow", 8, lambda own, uri=subject.plan.cfg.tracking.uri: run_checks.tracking(own, uri))
    return report


def _together(here: Meeting, report: Report) -> None:
    here.doing("all-reduce")
    try:
        report.facts |= here.collective(TOGETHER - _MARGIN)
    except FovealError as error:
        report.fault("reach", str(error))


def _told(here: Meeting, found: dict[int, Report], order: Order, hung: set[int]) -> int:
    """Print what came of it; the exit code."""
    placed = nodes_of_ranks(here.seat.size)
    silent: dict[int, tuple[str, str]] = {}
    for rank in sorted(set(range(here.seat.size)) - set(found) | hung):
        words = here.last_words(rank)
        if words is None:
            silent[rank] = (placed[rank] if placed else "", f"rank {rank} did not come within {order.joining:.0f} s")
        else:
            silent[rank] = (words[0], f"rank {rank} said nothing more after it began {words[1]}")
    reports = [found[rank] for rank in sorted(found)]
    verdict = judged(reports, silent, order.slowest)
    for line in lines_of(reports, silent, verdict.bad):
        typer.echo(line)
    links = [each.facts["bandwidth"] for each in reports if "bandwidth" in each.facts]
    if links:
        delay = max(each.facts["latency"] for each in reports if "latency" in each.facts)
        typer.echo(
            f"all-reduce among {len(links)} ranks: right, {min(links) / 1e9:.3g} GB/s, {delay * 1e6:.0f} us for 8 bytes"
        )
    for sentence in verdict.sentences:
        typer.echo(sentence)
    for name in verdict.bad:
        why = verdict.why[name]
        typer.echo(f"foveal: suspect node {name}: {why}", err=True)
    if verdict.code == BadNode.exit_code:
        typer.echo(f"bad nodes: {','.join(verdict.bad) or 'unknown'}")
    return verdict.code


def _orphaned(here: Meeting) -> int:
    """Rank 0 is gone: the others say so."""
    nodes = nodes_of_ranks(here.seat.size)
    where = nodes[0] if nodes else "its node"
    typer.echo(f"foveal: suspect node {where}: rank 0 said nothing more, as rank {here.seat.rank} sees it", err=True)
    return BadNode.exit_code
