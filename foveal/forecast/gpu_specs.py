"""GPUs by name, as their vendors' data sheets describe them (dense rates, without sparsity), and how fast each may go."""

from dataclasses import dataclass

from foveal.engines.base import EngineConfig
from foveal.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Gpu:
    """Memory in 10^9 bytes; rates in 10^12 operations a second for bf16, TF32 and fp32 products."""

    gigabytes: float
    bf16: float
    tf32: float
    fp32: float

    def rate(self, cfg: EngineConfig) -> float:
        """The highest rate that an engine's products can have."""
        if cfg.precision == "bf16":
            return self.bf16
        return self.fp32 if cfg.matmul == "highest" else self.tf32


GPUS = {
    "a100-40": Gpu(40, 312, 156, 19.5),
    "a100": Gpu(80, 312, 156, 19.5),
    "l40s": Gpu(48, 362, 183, 91.6),
    "h100": Gpu(80, 989, 494, 67),
    "h200": Gpu(141, 989, 494, 67),
    "b200": Gpu(180, 2250, 1125, 75),
}


def gpu_named(name: str) -> Gpu:
    """The GPU of a name. Errors: ConfigError that lists the names."""
    found = GPUS.get(name.lower())
    if found is None:
        raise ConfigError(
            f"--gpu {name} is not known; there are {', '.join(GPUS)}, or give --gpu-memory and --peak-tflops"
        )
    return found
