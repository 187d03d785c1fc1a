"""What turns a loss into an update: DeepSpeed, Accelerate, FSDP2, or plain PyTorch."""
