"""Engines, which turn a loss into an update: DeepSpeed, Accelerate (DDP, FSDP2, DeepSpeed's plugin), plain PyTorch."""
