"""What the device and the host do in steady steps, from a profiler's trace. Run by gpu.py."""

import bisect
import gzip
import json
import re
import shutil
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_training import Bench, open_training
from torch.profiler import ProfilerActivity, profile

_WARM_UP, _UNPROFILED, _PROFILED = 8, 20, 20  # steps
_MOST_KERNELS = 30
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST = ("cuda_runtime", "cuda_driver")
# Kinds of kernels by their names, the first that matches: fused attention is built from products, and casts are copies.
KINDS = {
    "attention": r"flash|fmha|sdpa|attention",
    "products": r"gemm|gemv|nvjet|cutlass|xmma|wgmma|cublas|splitk|::convolve|conv2d|dgrad|wgrad|fprop",
    "optimizer": r"adam",
    "copies and casts": r"copy|memcpy|memset|catarray|fill|index|gather|scatter",
    "norms": r"layer_?norm|softmax|lpnorm",
    "reductions": r"reduce|sum",
    "compiled": r"^triton_",
    "elementwise": r"elementwise|gelu|unrolled|vectorized|multi_tensor",
}


@dataclass(frozen=True)
class Event:
    """Something with a beginning and an end, in microseconds."""

    name: str
    start: float
    end: float
    correlation: int

    @property
    def duration(self) -> float:
        return self.end - self.start


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE)), "other")


def profile_lines(bench: Bench, trace_file: Path | None, folder: Path) -> Iterator[str]:
    """Profile steps of ViT-B/16 under the plain engine; yield where their time goes.

    trace_file: where the trace is kept, gzipped.
    """
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with open_training(bench, "ViT-B/16", "engine.kind=plain", "engine.compile=false") as training:
        training.run(_WARM_UP)
        with profile(activities=activities):  # the profiler's own start
            training.run(1)
        training.run(_UNPROFILED)
        unprofiled = training.rates()["images_per_second"]
        with profile(activities=activities) as profiler:
            training.run(_PROFILED)
        profiled = training.rates()["images_per_second"]
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    if trace_file is not None:
        with trace.open("rb") as source, gzip.open(trace_file, "wb") as target:
            shutil.copyfileobj(source, target)
    events = json.loads(trace.read_text())["traceEvents"]
    yield f"{unprofiled:,.0f} images/s before the profiler, {profiled:,.0f} under it; all below is under it."
    yield ""
    device = read_events(events, _DEVICE if on_gpu else ("cpu_op",))
    if not device:
        yield "The profiler saw nothing of the device."
        return
    yield from device_lines(device)
    yield from host_lines(device, read_events(events, _HOST))


def read_events(events: Iterable[dict[str, Any]], categories: tuple[str, ...]) -> list[Event]:
    """Return the complete events of these categories, by their beginning."""
    found = [
        Event(event["name"], event["ts"], event["ts"] + event["dur"], event.get("args", {}).get("correlation", -1))
        for event in events
        if event.get("ph") == "X" and event.get("cat") in categories
    ]
    return sorted(found, key=lambda event: event.start)


def gaps_between(events: list[Event]) -> list[float]:
    """Return the microseconds in which none of the events, sorted by their beginning, goes on."""
    gaps, busy_until = [], events[0].end
    for event in events[1:]:
        if event.start > busy_until:
            gaps.append(event.start - busy_until)
        busy_until = max(busy_until, event.end)
    return gaps


def device_lines(device: list[Event]) -> Iterator[str]:
    """Yield the device's time by kind and by kernel, and its idle time."""
    window = max(event.end for event in device) - device[0].start
    total = sum(event.duration for event in device)
    gaps = gaps_between(device)
    short, middle, long = (
        sum(gap for gap in gaps if low <= gap < high) / window for low, high in ((0, 10), (10, 100), (100, 1e12))
    )
    yield (
        f"A step takes {window / _PROFILED / 1e3:.2f} ms and has {len(device) / _PROFILED:,.0f} kernels and copies. The device "
        f"is idle for {sum(gaps) / window:.1%} of the time: {short:.1%} in gaps below 10 us, {middle:.1%} below 100 us, "
        f"{long:.1%} in longer ones. Shares below are of the kernels' own time."
    )
    by_kind: dict[str, list[float]] = defaultdict(list)
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in device:
        by_kind[kind_of(event.name)].append(event.duration)
        by_name[event.name].append(event.duration)
    yield from ("", "| kind | ms a step | share | times a step |", "|---|--:|--:|--:|")
    yield from (_time_row(kind, durations, total) for kind, durations in _longest(by_kind))
    yield from ("", "| kernel | ms a step | share | times a step |", "|---|--:|--:|--:|")
    for name, durations in _longest(by_name)[:_MOST_KERNELS]:
        short_name = re.sub(r"\s+", " ", name).replace("|", "/")[:110]
        yield _time_row(f"`{short_name}` ({kind_of(name)})", durations, total)


def host_lines(device: list[Event], host: list[Event]) -> Iterator[str]:
    """Yield what the host's calls of the device take, and how long a kernel waits between its launch and its start."""
    if not host:
        yield from ("", "The profiler saw no call of the host.")
        return
    window = max(event.end for event in device) - device[0].start
    launches = [event for event in host if "launch" in event.name.lower()]
    launched = {event.correlation: event.start for event in launches}
    waits = sorted(event.start - launched[event.correlation] for event in device if event.correlation in launched)
    yield ""
    if waits:
        near = bisect.bisect_left(waits, 20.0) / len(waits)
        yield (
            f"Launches take the host {sum(event.duration for event in launches) / window:.1%} of the time. A kernel begins "
            f"{statistics.median(waits):,.0f} us after its launch (median), and {near:.0%} of them within 20 us: those the "
            f"device has waited for."
        )
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in host:
        by_name[event.name].append(event.duration)
    total = sum(event.duration for event in host)
    yield from ("", "| call of the host | ms a step | share | times a step |", "|---|--:|--:|--:|")
    yield from (_time_row(name, durations, total) for name, durations in _longest(by_name)[:10])


def _longest(groups: dict[str, list[float]]) -> list[tuple[str, list[float]]]:
    return sorted(groups.items(), key=lambda item: -sum(item[1]))


def _time_row(name: str, durations: list[float], total: float) -> str:
    seconds = sum(durations)
    return f"| {name} | {seconds / _PROFILED / 1e3:.3f} | {seconds / total:.1%} | {len(durations) / _PROFILED:,.1f} |"
