"""GPU memory and peak rates from vendors' data sheets (dense, without sparsity)."""

from dataclasses import dataclass

from foveal.engines.config import EngineConfig
from foveal.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """Memory in 10^9 bytes; peak rates in 10^12 FLOP/s for bf16, TF32 and fp32 matrix products."""

    memory_gb: float
    bf16_tflops: float
    tf32_tflops: float
    fp32_tflops: float

    def peak_tflops(self, cfg: EngineConfig) -> float:
        """Return the peak rate of matrix products under the engine's precision settings."""
        if cfg.precision == "bf16":
            return self.bf16_tflops
        return self.fp32_tflops if cfg.float32_matmul_precision == "highest" else self.tf32_tflops


GPU_SPECS = {
    "a100-40": GpuSpec(40, 312, 156, 19.5),
    "a100": GpuSpec(80, 312, 156, 19.5),
    "l40s": GpuSpec(48, 362, 183, 91.6),
    "h100": GpuSpec(80, 989, 494, 67),
    "h200": GpuSpec(141, 989, 494, 67),
    "b200": GpuSpec(180, 2250, 1125, 75),
}


def find_gpu_spec(name: str, alternative: str = "") -> GpuSpec:
    """Return the GPU of a name. Raises: ConfigError with the known names, and the ``alternative`` to a name."""
    spec = GPU_SPECS.get(name.lower())
    if spec is None:
        raise ConfigError(f"--gpu {name} is not known; there are {', '.join(GPU_SPECS)}{alternative}")
    return spec
