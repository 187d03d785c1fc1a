"""Host memory of a node: the pinned copies of a checkpoint, and the processes that read the data with their slabs."""

from dataclasses import dataclass

from foveal.checkpoint.chunks import count_replica_writers
from foveal.data.batch_plan import BatchPlan, EvaluationBatchPlan
from foveal.data.batch_stream import count_slots
from foveal.data.row_arrays import RowLayout
from foveal.data.slab import count_slab_bytes
from foveal.engines.config import EngineConfig
from foveal.forecast.memory import deepspeed_zero_stage
from foveal.forecast.trace import ParameterCounts
from foveal.optim.config import OptimConfig
from foveal.optim.optimizers import count_moment_elements
from foveal.training.data_workers import MAX_AUTO_WORKERS, plan_first_step
from foveal.training.plan import Plan

_FP32 = 4
# Memory without a file, measured with 1 and 3 workers that read photographs of 224 px (Pss_Anon of smaps_rollup, torch
# 2.15, x86): libraries that the server has imported and shares with its workers, and what each worker adds.
_SERVER_BYTES, _WORKER_BYTES = 316_000_000, 12_000_000


def estimate_pinned_bytes(
    parameters: ParameterCounts, cfg: EngineConfig, optim: OptimConfig, *, nodes: int, gpus_per_node: int
) -> int:
    """Return the bytes that the ranks of one node pin, of the node that pins most.

    Each rank copies its shard; what all ranks hold is copied by at most 16 of them, on different nodes if there are as
    many. torch rounds a pinned allocation up to a power of two.
    """
    ranks = nodes * gpus_per_node
    moments = count_moment_elements(optim, parameters.trainable, parameters.hidden_matrices)
    trained = (parameters.trainable + moments) * _FP32
    stage = deepspeed_zero_stage(cfg)
    if stage == 3 or (cfg.kind == "accelerate" and cfg.sharding == "fsdp2"):
        sharded = parameters.checkpoint_bytes
    else:
        sharded = trained if stage else 0
    writers = count_replica_writers(ranks)
    writers_of_node = -(-gpus_per_node * writers // ranks)
    shard, share = sharded / ranks, (parameters.checkpoint_bytes - sharded) / writers
    others = gpus_per_node - writers_of_node
    return writers_of_node * _round_up_to_power_of_two(shard + share) + others * _round_up_to_power_of_two(shard)


@dataclass(frozen=True, slots=True)
class LoaderMemory:
    """Bytes that the processes of a node's loaders hold.

    ``workers_per_rank``: at most so many, with data.workers=auto. ``slab_bytes``: of microbatches in memory that the
    ranks share with their workers, page-locked where there are GPUs; ``process_bytes``: private to servers and workers.
    """

    workers_per_rank: int
    slab_bytes: int
    process_bytes: int


def estimate_loader_memory(plan: Plan, gpus_per_node: int) -> LoaderMemory | None:
    """Return the memory of the loaders of one node; None if ranks read without processes (data.workers=0).

    A rank has a slab for training, and a second one if it evaluates.
    """
    cfg = plan.cfg.data
    workers = MAX_AUTO_WORKERS if cfg.workers == "auto" else cfg.workers
    if not workers:
        return None
    streams: list[BatchPlan] = [plan_first_step(plan, rank=0)]
    if plan.cfg.evaluate_every or not plan.cfg.evaluates_knn:  # fine-tuning evaluates at its end
        # Which samples they are does not matter to the size of a slab.
        source = plan.training_set.sources[0]
        rows = plan.cfg.batch.max_micro_size
        streams.append(EvaluationBatchPlan(source, cfg, 0, plan.world_size, rows, plan.label_reader))
    slabs = [
        count_slab_bytes(RowLayout.from_plan(stream), count_slots(stream, cfg.prefetch_batches)) for stream in streams
    ]
    processes = _SERVER_BYTES + workers * _WORKER_BYTES
    return LoaderMemory(workers, gpus_per_node * sum(slabs), gpus_per_node * processes)


def _round_up_to_power_of_two(size: float) -> int:
    return 1 << (round(size) - 1).bit_length() if size >= 1 else 0
