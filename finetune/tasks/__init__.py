"""The tasks of fine-tuning, each a subclass of ``finetune.task.Task`` with its loss and its metrics."""
