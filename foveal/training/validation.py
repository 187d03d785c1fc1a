"""Evaluations while a run trains: when they are due, and those of encoders, by their objective and by k-NN on labels.

An evaluation changes nothing that training uses: it draws no random numbers, and masks depend on (seed, epoch 0, sample
id), so that every evaluation has the same ones. B images, Q queries, N images of the bank, F feature width.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.data.batch import Batch
from foveal.data.image.transforms import normalise
from foveal.data.sampling.subset import eval_split, select_subset
from foveal.engines.base import Engine
from foveal.training.knn import IMAGE_BLOCK_SIZE, QUERY_BLOCK_SIZE, predict_knn_classes
from foveal.training.loop import Objective
from foveal.training.run import Run

# The protocol of Wu et al. ("Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018) and DINO
# (Caron et al., 2021), with DINO's k.
_KNN_K, _KNN_TEMPERATURE = 20, 0.07


def evaluate_if_due(
    run: Run, step: int, compute_metrics: Callable[[], dict[str, float]], *, last_step: int | None = None
) -> bool:
    """Evaluate after a step if that is due, record the metrics, and return whether it was due.

    Due are every ``evaluate_every`` steps (0: none) and the run's last step, as far as ``last_step`` (None: the run's
    last). A run resumed from a checkpoint repeats the evaluation of the checkpoint's step, which the checkpoint does
    not hold. Every rank calls it.
    """
    every, total_steps = run.plan.cfg.evaluate_every, run.plan.total_steps
    is_due = every > 0 and (step % every == 0 or step == total_steps)
    if not is_due or not 0 < step <= (total_steps if last_step is None else last_step) or not run.read_updates():
        return False
    with timed_evaluation(run):
        metrics = compute_metrics()
    run.record_evaluation(step, metrics)
    return True


@contextmanager
def timed_evaluation(run: Run) -> Iterator[None]:
    """Show that the run evaluates, and count the time of the block as evaluation, not as training."""
    start = time.perf_counter()
    with run.progress.activity("evaluating"), run.throughput_meter.exclude_time():
        yield
    run.evaluation_seconds += time.perf_counter() - start


def evaluate_encoders(
    engine: Engine, run: Run, objective: Objective, step: int, encoder_names: Sequence[str] = ("",)
) -> dict[str, float]:
    """Return the objective's loss and metrics on data.val or the fold, and ``knn_top1`` of every encoder.

    Every image of the split counts once, on any number of ranks. Names have the prefix ``val_`` or ``fold_``, and k-NN
    of a named encoder is ``val_<name>/knn_top1``. There is no k-NN without ``encoder_names``, or if the images of the
    bank or of the split have no labels. ``engine.model(images, features_only=True)`` returns the features [B, F] of
    every encoder. Every rank calls it. Raises: DataError, on every rank, as ``Run.evaluation_batches``.
    """
    evaluated = eval_split(run.plan.cfg.data)
    with engine.eval_mode():
        bank = _encode_bank(engine, run, step) if encoder_names else None
        sums, labels = _MetricSums(), []
        features: list[list[Tensor]] = [[] for _ in encoder_names]
        for host_batch in run.evaluation_batches(step, split=evaluated.split, subset=evaluated.subset):
            batch = _select_valid_rows(host_batch).to(engine.device, non_blocking=True)
            loss_sum, metric_sums = objective(engine.model, batch)
            if host_batch.valid.any():
                sums.add({"loss": loss_sum} | metric_sums, objective.batch_weight(batch))
            else:
                sums.add_zero({"loss": loss_sum} | metric_sums)
            if bank is not None:
                labels.append(batch.labels)
                for encoder_features, values in zip(features, _encode(engine, run, batch), strict=True):
                    encoder_features.append(values)
    metrics = sums.compute_means(run)
    if bank is not None:
        for name, values, bank_features in zip(encoder_names, features, bank.features, strict=True):
            top1 = _compute_knn_top1(run, step, torch.cat(values), torch.cat(labels), bank_features, bank.labels)
            metrics |= {} if top1 is None else {f"{name}/knn_top1" if name else "knn_top1": top1}
    return {f"{evaluated.metric_prefix}_{metric}": value for metric, value in metrics.items()}


def _select_valid_rows(batch: Batch) -> Batch:
    """Return the valid rows of a batch on the host; row 0, which has no label, of a batch without any.

    Ranks must run the same number of forwards, because an engine that shards weights gathers them in each.
    """
    rows = batch.valid.nonzero().flatten()
    return batch if len(rows) == len(batch.valid) else batch.select_rows(rows if len(rows) else torch.zeros(1).long())


class _MetricSums:
    """Sums of metrics and of their weight over this rank's batches, in float64."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weight: float | Tensor = 0.0

    def add(self, metric_sums: dict[str, Tensor], weight: float | Tensor) -> None:
        """Add the sums of a batch."""
        for name, value in metric_sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double()
        self._weight = self._weight + weight

    def add_zero(self, metric_sums: dict[str, Tensor]) -> None:
        """Add a batch without valid rows: every rank needs all names."""
        self.add({name: torch.zeros_like(value) for name, value in metric_sums.items()}, 0.0)

    def compute_means(self, run: Run) -> dict[str, float]:
        """Return the sums over the weight, each over all ranks."""
        weight = torch.as_tensor(self._weight, dtype=torch.float64, device=run.world.device)
        totals = run.world.all_reduce_sum(torch.stack([weight, *self._sums.values()])).tolist()
        total_weight = totals[0] or 1.0  # data.max_bad_fraction may allow that no sample decodes
        return {name: total / total_weight for name, total in zip(self._sums, totals[1:], strict=True)}


@dataclass(frozen=True)
class _Bank:
    """Features [N, F] of every encoder and labels [N] of training images, on the device, in the order of their ids."""

    features: list[Tensor]
    labels: Tensor


def _encode_bank(engine: Engine, run: Run, step: int) -> _Bank | None:
    """Return the bank, the same on every rank; None if no training image has a label."""
    plan, data = run.plan, run.plan.cfg.data
    if plan.dataset.classes is None:
        return None
    subset = select_subset(plan.dataset, data, split=data.train, subset="bank", seed=plan.cfg.seed)
    if not len(subset):
        return None
    ids = torch.from_numpy(subset.split_positions).to(engine.device)
    counts = torch.zeros_like(ids)  # label + 1; 0: not encoded by this rank
    features: list[Tensor] = []
    for host_batch in run.evaluation_batches(step, split=data.train, subset="bank", purpose="k-NN features"):
        batch = _select_valid_rows(host_batch).to(engine.device, non_blocking=True)
        batch_features = _encode(engine, run, batch)
        features = features or [values.new_zeros(len(ids), values.shape[1]) for values in batch_features]
        if host_batch.valid.any():
            rows = torch.searchsorted(ids, batch.ids)
            counts[rows] = batch.labels + 1
            for bank_rows, values in zip(features, batch_features, strict=True):
                bank_rows[rows] = values
    # Each row is zero on all ranks but one, so that the sums are exact.
    labels = run.world.all_reduce_sum(counts) - 1
    decoded = labels >= 0
    return _Bank([run.world.all_reduce_sum(values)[decoded] for values in features], labels[decoded])


def _encode(engine: Engine, run: Run, batch: Batch) -> list[Tensor]:
    """Return the features [B, F] of every encoder, float32; a value that is not finite becomes 0."""
    images = normalise(batch.images, run.plan.mean, run.plan.std)
    features = engine.model(images, features_only=True)
    return [values.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for values in features]


def _compute_knn_top1(
    run: Run, step: int, queries: Tensor, labels: Tensor, bank_features: Tensor, bank_labels: Tensor
) -> float | None:
    """Return the fraction of all ranks' labelled queries whose class k-NN predicts; None without any.

    ``queries`` [Q, F] and ``labels`` [Q] are this rank's; label -1: none.
    """
    queries, labels = queries[labels >= 0], labels[labels >= 0]
    k = min(_KNN_K, len(bank_labels))
    num_correct = torch.zeros((), dtype=torch.float64, device=labels.device)
    with run.progress.activity("k-NN on this rank", len(queries)) as activity:
        for start in range(0, len(queries) if k else 0, QUERY_BLOCK_SIZE):
            run.watchdog.heartbeat(step, "evaluating")
            rows = slice(start, start + QUERY_BLOCK_SIZE)
            predictions = predict_knn_classes(
                queries[rows].double(),
                _iter_blocks(bank_features),
                bank_labels,
                (k,),
                len(run.plan.dataset.classes or ()),
                metric="cosine",
                vote="softmax",
                temperature=_KNN_TEMPERATURE,
            )
            num_correct += (predictions[0] == labels[rows]).sum()
            activity.advance(QUERY_BLOCK_SIZE)
    totals = torch.stack([num_correct, torch.full_like(num_correct, len(labels))])
    correct, total = run.world.all_reduce_sum(totals).tolist()
    return correct / total if k and total else None


def _iter_blocks(features: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(features), IMAGE_BLOCK_SIZE):
        yield features[start : start + IMAGE_BLOCK_SIZE].double()
