"""The only folder that speaks to other processes: torch.distributed, DeepSpeed and Accelerate are imported nowhere else."""
