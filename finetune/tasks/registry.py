"""The tasks of fine-tuning by name, the values of the setting ``task``."""

from finetune.task import Task
from finetune.tasks.classify import Classification
from finetune.tasks.detect import Detection
from finetune.tasks.multilabel import MultiLabelClassification
from finetune.tasks.segment import Segmentation
from foveal.errors import ConfigError

TASKS: dict[str, Task] = {
    Classification.name: Classification(),
    MultiLabelClassification.name: MultiLabelClassification(),
    Segmentation.name: Segmentation(),
    Detection.name: Detection(),
}


def find_task(name: str) -> Task:
    """Return the task of this name. Raises: ConfigError."""
    if name not in TASKS:
        raise ConfigError(f"task={name} does not exist; there are {', '.join(TASKS)}")
    return TASKS[name]
