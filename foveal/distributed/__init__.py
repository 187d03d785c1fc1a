"""Communication between processes. Only this folder and foveal/engines import torch.distributed."""
