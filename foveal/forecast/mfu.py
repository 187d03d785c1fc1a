"""Model FLOPs utilisation (MFU), the part of a GPU's peak rate that training uses: measured and hoped for, or stated."""

from typing import Any

# 1,106 images/s (2 threads: 1,397) of 58 GFLOP, of 989 TFLOP/s: benchmarks/results/gpu.md, which divides by another rate,
# the 675 TFLOP/s that `foveal doctor` measured there.
MEASURED_MFU = 0.065
HOPED_MFU = 0.4
_NOTES = (
    "6.5 % was measured: ViT-B/16 pretraining in bf16 under ZeRO 1 on one H200 with 12 decoding threads, foveal 0.2,",
    "  torch 2.11 (benchmarks/results/gpu.md; 2 threads: 8.2 %). No other GPU and no other model was measured",
    "40 % is usual where nothing holds the GPU back, and was never measured with foveal; --mfu states a number of yours",
)


def mfu_range(stated: float | None, precision: str) -> dict[str, Any]:
    """Return ``mfu``, ``hoped_mfu`` and ``mfu_notes`` of a cluster: as stated, else from measured to hoped for."""
    if stated is not None:
        return {"mfu": stated}
    others = () if precision == "bf16" else (f"in {precision} nothing was measured; its lower peak is easier to reach",)
    return {"mfu": MEASURED_MFU, "hoped_mfu": HOPED_MFU, "mfu_notes": (*_NOTES, *others)}
