"""Host memory that ranks pin for a checkpoint: the copy of what each writes, kept from the first save on."""

from foveal.checkpoint.chunks import count_replica_writers
from foveal.engines.config import EngineConfig
from foveal.forecast.memory import deepspeed_zero_stage
from foveal.forecast.trace import ParameterCounts
from foveal.optim.config import OptimConfig
from foveal.optim.optimizers import count_moment_elements

_FP32 = 4


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


def _round_up_to_power_of_two(size: float) -> int:
    return 1 << (round(size) - 1).bit_length() if size >= 1 else 0
