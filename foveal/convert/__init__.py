"""Exports for other libraries: timm, Hugging Face's transformers, ONNX, torch.export and plain safetensors."""
