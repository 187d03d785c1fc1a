"""GPUs by name, as their vendors' data sheets describe them (dense rates, without sparsity), and how fast each may go."""

from dataclasses import dataclass

from foveal.engines.base import EngineConfig
from foveal.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """Memory in 10^9 bytes; rates in 10^12 operations a second for bf16, TF32 and fp32 products."""

    memory_gb: float
    bf16_tflops: float
    tf32_tflops: float
    fp32_tflops: float

    def peak_tflops(self, cfg: EngineConfig) -> float:
        """The highest rate that an engine's products can have."""
        if cfg.precision == "bf16":
            return self.bf16_tflops
        return self.fp32_tflops if cfg.matmul == "highest" else self.tf32_tflops


GPU_SPECS = {
    "a100-40": GpuSpec(40, 312, 156, 19.5),
    "a100": GpuSpec(80, 312, 156, 19.5),
    "l40s": GpuSpec(48, 362, 183, 91.6),
    "h100": GpuSpec(80, 989, 494, 67),
    "h200": GpuSpec(141, 989, 494, 67),
    "b200": GpuSpec(180, 2250, 1125, 75),
}


def find_gpu_spec(name: str) -> GpuSpec:
    """The GPU of a name. Raises: ConfigError that lists the names."""
    found = GPU_SPECS.get(name.lower())
    if found is None:
        raise ConfigError(
            f"--gpu {name} is not known; there are {', '.join(GPU_SPECS)}, or give --gpu-memory and --peak-tflops"
        )
    return found
