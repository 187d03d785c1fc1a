"""The section of a model card that loads the model, in foveal and in timm. tests/unit/weights runs its lines."""

from foveal.weights.card import Card, task_of
from foveal.weights.markdown import escape
from foveal.weights.timm_folder import explain_encoder_not_timm

EXPORT, IMAGE = "path/to/this/folder", "image.jpg"  # what a reader replaces
# What is done with the output, by task; {classes} is the expression of the class names. Other heads say nothing.
_RESULTS: dict[str | None, str] = {
    "classification": "print({classes}[output.argmax()])\n",
    "multilabel": "print([name for name, logit in zip({classes}, output[0]) if logit > 0])\n",
    "segmentation": "class_numbers = output.argmax(dim=1)  # [1, height, width], into {classes}\n",
    None: "print(output.shape)\n",
}


def loading_section(card: Card) -> str:
    """Return the section as Markdown: lines for foveal, and for timm if it can build the encoder."""
    task = task_of(card)
    if card.head is None and not card.classes:
        task = None  # classes without names
    text = f"## How to load\n\nWith foveal:\n\n```python\n{_foveal_lines(task)}```\n\n"
    reason = explain_encoder_not_timm(card)
    if reason is not None:
        return f"{text}timm alone cannot load this model: {escape(reason)}.\n"
    subject = "With timm alone" if card.head is None else "With timm alone, the encoder without its head"
    auto = "AutoModelForImageClassification" if card.encoder.get("classes") else "AutoModel"
    wrapped = f'transformers reads the folder through timm: `{auto}.from_pretrained("{EXPORT}")`.\n'
    timm_lines = _timm_lines(card, None if card.head else task)
    return f"{text}{subject}:\n\n```python\n{timm_lines}```\n\n{wrapped}"


def _foveal_lines(task: str | None) -> str:
    result = _RESULTS.get(task, "").format(classes="model.classes")
    return (
        "import foveal\n"
        "import torch\n\n"
        f'model = foveal.load("{EXPORT}")\n'
        f'image = model.transform("{IMAGE}")\n'
        "with torch.inference_mode():\n"
        f"    output = model.module(image[None])\n{result}"
    )


def _timm_lines(card: Card, task: str | None) -> str:
    mode = "L" if card.encoder["channels"] == 1 else "RGB"
    result = _RESULTS.get(task, "").format(classes='model.pretrained_cfg["label_names"]')
    return (
        "import timm\n"
        "import torch\n"
        "from PIL import Image\n"
        "from timm.data import create_transform, resolve_model_data_config\n\n"
        f'model = timm.create_model("local-dir:{EXPORT}", pretrained=True).eval()\n'
        "transform = create_transform(**resolve_model_data_config(model), is_training=False)\n"
        f'image = transform(Image.open("{IMAGE}").convert("{mode}"))\n'
        "with torch.inference_mode():\n"
        f"    output = model(image[None])\n{result}"
    )
