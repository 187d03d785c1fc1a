"""Who may import whom: the table that tests/house/test_one_way_doors.py holds the code against."""

from house import STAGES

CONFIGURED = ("foveal.config", "foveal.errors", "foveal.redact", "foveal.renames", "foveal.strict_yaml")
RUN_FACTS = ("foveal.runs.inputs", "foveal.runs.results", "foveal.tracking.tail")
TRACKED = tuple(f"foveal.tracking.{name}" for name in ("exported", "mlflow_names", "store_errors", "tracker"))
STAGE_CONFIGS = ("pretrain.config", "distill.config", "finetune.config")

# room: (rooms it may enter, libraries it may bring). The longest name that fits a module is its room: a folder, or a
# file of a folder whose other files stand on another floor.
ROOMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # The front door: foveal.load imports what it needs when it is called.
    "foveal": (("foveal.inference",), ()),
    # The ground floor: no room of ours above it is known there.
    "foveal.redact": ((), ()),
    "foveal.errors": (("foveal.redact",), ()),
    "foveal.atomic": (("foveal.errors",), ()),
    "foveal.interrupt": ((), ()),
    "foveal.timeouts": (("foveal.errors",), ()),
    "foveal.cgroups": ((), ()),
    "foveal.slurm": (("foveal.errors",), ()),
    "foveal.seeding": ((), ("numpy", "torch")),
    "foveal.strict_yaml": (("foveal.errors", "foveal.timeouts"), ("yaml",)),
    "foveal.renames": (("foveal.errors",), ()),
    "foveal.setting_names": ((), ("pydantic",)),
    "foveal.config": (
        ("foveal.errors", "foveal.redact", "foveal.renames", "foveal.setting_names", "foveal.strict_yaml"),
        ("pydantic", "pydantic_core", "yaml"),
    ),
    "foveal.setting_docs": (("foveal.config", "foveal.setting_names"), ("pydantic", "pydantic_core")),
    "foveal.rules": (("foveal.config",), ()),
    # Data: from bytes to batches.
    "foveal.data.config": (CONFIGURED, ("pydantic",)),
    "foveal.data.batch": ((), ("torch",)),
    "foveal.data.format": (
        (*CONFIGURED, "foveal.atomic", "foveal.timeouts"),
        ("numpy", "pydantic", "safetensors"),
    ),
    "foveal.data.storage": (
        (*CONFIGURED, "foveal.atomic", "foveal.data.config", "foveal.data.format", "foveal.timeouts"),
        ("fsspec",),
    ),
    "foveal.data.indexing": (
        (*CONFIGURED, "foveal.data.config", "foveal.data.format", "foveal.data.storage"),
        ("numpy",),
    ),
    "foveal.data.dataset": (
        (*CONFIGURED, "foveal.data.config", "foveal.data.format", "foveal.data.storage", "foveal.timeouts"),
        ("numpy",),
    ),
    "foveal.data.sampling": (
        (*CONFIGURED, "foveal.data.config", "foveal.data.dataset", "foveal.data.format", "foveal.seeding"),
        ("numpy",),
    ),
    "foveal.data.image": (
        ("foveal.data.config", "foveal.data.dataset", "foveal.errors"),
        ("numpy", "torch", "torchvision", "PIL", "simplejpeg"),
    ),
    "foveal.data": (
        (
            *CONFIGURED,
            "foveal.cgroups",
            "foveal.data.batch",
            "foveal.data.config",
            "foveal.data.dataset",
            "foveal.data.format",
            "foveal.data.image",
            "foveal.data.sampling",
            "foveal.seeding",
            "foveal.timeouts",
        ),
        ("numpy", "torch"),
    ),
    "foveal.data.records": (
        ("foveal.atomic", "foveal.data.batch", "foveal.data.dataset", "foveal.errors"),
        ("numpy",),
    ),
    "foveal.data.tools.progress_bar": ((), ("rich",)),
    "foveal.data.pack": (
        (
            *CONFIGURED,
            "foveal.atomic",
            "foveal.data.format",
            "foveal.data.image",
            "foveal.data.indexing",
            "foveal.data.tools.progress_bar",
            "foveal.seeding",
        ),
        ("numpy", "PIL", "pydantic", "webdataset", "sklearn", "datasets", "pyarrow", "typer"),
    ),
    "foveal.data.tools": (("foveal.data", "foveal.errors", "foveal.seeding"), ("numpy", "PIL", "typer")),
    # What is trained, and by what.
    "foveal.models": (CONFIGURED, ("torch", "torchvision", "timm", "numpy", "pydantic")),
    "foveal.optim": (CONFIGURED, ("pydantic", "timm", "torch")),
    "foveal.checkpoint": ((*CONFIGURED, "foveal.atomic", "foveal.timeouts"), ("pydantic", "torch", "safetensors")),
    "foveal.distributed": (
        (*CONFIGURED, "foveal.atomic", "foveal.slurm", "foveal.timeouts"),
        ("torch", "torch.distributed", "pydantic"),
    ),
    "foveal.engines": (
        (*CONFIGURED, "foveal.checkpoint", "foveal.distributed", "foveal.optim"),
        ("torch", "torch.distributed", "deepspeed", "accelerate", "pydantic"),
    ),
    "foveal.weights": (
        (*CONFIGURED, "foveal.atomic", "foveal.data", "foveal.models", "foveal.timeouts"),
        ("pydantic", "torch", "safetensors"),
    ),
    "foveal.inference": (
        (
            *CONFIGURED,
            "foveal.atomic",
            "foveal.data",
            "foveal.distributed.launcher",
            "foveal.inspect",
            "foveal.models",
            "foveal.timeouts",
            "foveal.weights",
        ),
        ("numpy", "PIL", "pyarrow", "torch", "typer"),
    ),
    # transformers, onnx and onnxruntime come by their names, when a format needs them.
    "foveal.convert": (
        (
            *CONFIGURED,
            "foveal.atomic",
            "foveal.checkpoint",
            "foveal.data",
            "foveal.distributed",
            "foveal.inference",
            "foveal.models",
            "foveal.training.lease",
            "foveal.weights",
        ),
        ("numpy", "PIL", "safetensors", "timm", "torch", "typer"),
    ),
    "foveal.inspect.picture": (("foveal.atomic",), ("PIL",)),
    "foveal.inspect": (("foveal.atomic", "foveal.data.image", "foveal.models"), ("numpy", "torch", "PIL")),
    # Tracking: MLflow's library stays behind five files.
    "foveal.tracking.tracker": (("foveal.config", "foveal.redact"), ("pydantic",)),
    "foveal.tracking.tail": (("foveal.atomic", "foveal.errors", "foveal.renames", "foveal.tracking.tracker"), ()),
    "foveal.tracking.mlflow_names": (("foveal.tracking.tracker",), ()),
    "foveal.tracking.params": ((), ()),
    "foveal.tracking.description": (("foveal.redact", "foveal.renames", *RUN_FACTS), ()),
    "foveal.tracking.exported": (
        ("foveal.atomic", "foveal.errors", *RUN_FACTS, "foveal.tracking.mlflow_names", "foveal.tracking.tracker"),
        (),
    ),
    "foveal.tracking.sync_facts": (("foveal.errors", *RUN_FACTS, *TRACKED, "foveal.tracking.description"), ()),
    "foveal.tracking.mlflow_status": ((), ("mlflow",)),
    "foveal.tracking.mlflow_runs": (("foveal.atomic", "foveal.redact", "foveal.tracking.tail"), ("mlflow",)),
    "foveal.tracking.mlflow_models": (("foveal.redact", *TRACKED), ("mlflow",)),
    "foveal.tracking.mlflow_facts": (
        (
            *("foveal.redact", *RUN_FACTS, *TRACKED, "foveal.tracking.description"),
            *("foveal.tracking.mlflow_models", "foveal.tracking.mlflow_runs", "foveal.tracking.mlflow_status"),
        ),
        ("mlflow",),
    ),
    "foveal.tracking.mlflow": (
        (
            *(
                "foveal.redact",
                "foveal.renames",
                *TRACKED,
                "foveal.tracking.mlflow_facts",
                "foveal.tracking.mlflow_runs",
            ),
            *("foveal.tracking.mlflow_status", "foveal.tracking.params", "foveal.tracking.sqlite_store"),
            "foveal.tracking.sync_facts",
        ),
        ("mlflow",),
    ),
    "foveal.tracking.store_errors": (("foveal.tracking.tracker",), ()),
    "foveal.tracking.sqlite_store": (("foveal.atomic", "foveal.tracking.store_errors"), ()),
    "foveal.tracking": (
        (*CONFIGURED, "foveal.atomic", "foveal.runs.inputs", "foveal.runs.results", "foveal.tracking"),
        (),
    ),
    # Run directories, read from outside.
    "foveal.runs.results": ((), ()),
    "foveal.runs.inputs": (("foveal.atomic", "foveal.errors"), ("pydantic",)),
    "foveal.runs": (
        (
            *CONFIGURED,
            "foveal.atomic",
            "foveal.runs.inputs",
            "foveal.runs.results",
            "foveal.tracking",
            "foveal.training.lease",
            "foveal.training.lease_holder",
            "foveal.training.lineage",
        ),
        (),
    ),
    # One attempt at a run.
    "foveal.training.lease_holder": (("foveal.slurm",), ()),
    "foveal.training.lease": (("foveal.atomic", "foveal.errors", "foveal.training.lease_holder"), ()),
    "foveal.training.lineage": (("foveal.atomic", "foveal.errors"), ()),
    "foveal.training.meters": (("foveal.atomic",), ("torch",)),
    "foveal.training": (
        (
            *CONFIGURED,
            "foveal.atomic",
            "foveal.cgroups",
            "foveal.checkpoint",
            "foveal.data",
            "foveal.distributed",
            "foveal.engines",
            "foveal.inspect.picture",
            "foveal.interrupt",
            "foveal.optim",
            "foveal.rules",
            "foveal.runs",
            "foveal.setting_docs",
            "foveal.setting_names",
            "foveal.slurm",
            "foveal.timeouts",
            "foveal.tracking",
            "foveal.training.lease",
            "foveal.training.lease_holder",
            "foveal.training.lineage",
            "foveal.training.meters",
            "foveal.weights",
        ),
        ("pydantic", "pydantic_core", "rich", "torch"),
    ),
    # The commands, which look at plans, nodes and runs.
    "foveal.forecast": (
        (
            "foveal.checkpoint",
            "foveal.data",
            "foveal.engines",
            "foveal.errors",
            "foveal.models",
            "foveal.optim",
            "foveal.slurm",
            "foveal.training",
        ),
        ("numpy", "torch", "typer"),
    ),
    "foveal.doctor": (
        (
            *CONFIGURED,
            "foveal.atomic",
            "foveal.data",
            "foveal.distributed",
            "foveal.engines",
            "foveal.forecast",
            "foveal.slurm",
            "foveal.timeouts",
            "foveal.training",
        ),
        ("torch", "typer"),
    ),
    "foveal.commands": (
        (
            *CONFIGURED,
            "foveal.atomic",
            "foveal.distributed.launcher",
            "foveal.distributed.local_launch",
            "foveal.interrupt",
            "foveal.rules",
            "foveal.runs",
            "foveal.setting_docs",
            "foveal.setting_names",
            "foveal.tracking",
            "foveal.training.cli",
            "foveal.training.config",
            "foveal.training.config_files",
            "foveal.training.lease",
            "foveal.training.lease_holder",
            "foveal.training.lineage",
            "foveal.training.stage",
            "foveal.training.stage_help",
            *STAGE_CONFIGS,
        ),
        ("pydantic", "pydantic_core", "rich", "typer", "yaml"),
    ),
    "foveal.commands.init": (
        (
            *CONFIGURED,
            "foveal.atomic",
            "foveal.cgroups",
            "foveal.data",
            "foveal.distributed",
            "foveal.engines",
            "foveal.forecast",
            "foveal.models",
            "foveal.timeouts",
            "foveal.training",
            "foveal.weights",
        ),
        ("numpy", "torch", "typer"),
    ),
    "foveal.cli": (
        (
            "foveal.commands",  # the others by their names, when they are run
            "foveal.errors",
            "foveal.interrupt",
            "foveal.redact",
        ),
        ("typer",),
    ),
    # The stages: each imports foveal, none another stage.
    **dict.fromkeys(STAGES, (("foveal",), ("torch",))),
    "finetune.probe.config": (("foveal.config",), ("pydantic",)),
    "finetune.tasks.average_precision": (("foveal.errors",), ("numpy", "pycocotools")),
    "finetune": (
        ("foveal", "finetune.probe.config"),
        ("torch",),
    ),
    "finetune.regularizers": (("foveal", "finetune"), ("torch",)),
    "finetune.tasks": (
        ("foveal", "finetune", "finetune.regularizers", "finetune.tasks.average_precision"),
        ("numpy", "sklearn", "torch"),
    ),
    "finetune.checks": (("foveal", "finetune"), ("torch",)),
    "finetune.plan": (("foveal", "finetune"), ("numpy",)),
    "finetune.label_checks": (("foveal", "finetune"), ("numpy",)),
    "finetune.multirun": (("foveal", "finetune"), ()),
    "finetune.probe": (("foveal", "finetune"), ("numpy", "torch")),
    "finetune.fit": (("foveal", "finetune"), ("torch",)),
    "finetune.train": (("foveal", "finetune"), ("torch",)),
    "finetune.run": (("foveal", "finetune"), ()),
    "slurm": (
        (
            *CONFIGURED,
            "foveal.distributed.local_launch",
            "foveal.interrupt",
            "foveal.slurm",
            "foveal.training",
            *STAGE_CONFIGS,
        ),
        ("submitit", "torch", "yaml"),
    ),
}
