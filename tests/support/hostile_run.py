"""A run whose every name, text and file is hostile to HTML, and a reader of pages that says what is in them."""

import json
from html.parser import HTMLParser
from pathlib import Path

from run_folders import HOSTILE, draw_picture, training_rows, write_lines, write_run

from foveal.runs.inputs import DatasetInput, ModelInput, RunInputs

SECRET = "hunter2-planted"
SCRIPT, IMAGE, END, BRACES, BREAK, LINK, UMLAUT = HOSTILE


def write_hostile_run(folder: Path) -> Path:
    """Write a run in which each text of a user would do something in a page that does not escape it."""
    data = DatasetInput("training", SCRIPT, f"https://u:{SECRET}@host/data", IMAGE, END, 10, 10, 3)
    inner = RunInputs("/elsewhere", "pretrain", (data,))
    inputs = RunInputs("/run", "finetune", (data,), (ModelInput(LINK, f"/m/{IMAGE}", "0" * 64, SCRIPT, 7, inner),))
    run = write_run(
        folder / "a <b>name< & 'quote'",
        stage="finetune",
        settings={
            "model": {"name": IMAGE},
            "data": {"path": f"https://host/{SCRIPT}"},
            "tracking": {"uri": f"https://user:{SECRET}@host/{SCRIPT}"},
            "trials": {"arms": {SCRIPT: END, BRACES: LINK}},
            "card": {"model_description": BREAK},
        },
        rows=training_rows(names=[*HOSTILE, "val_top5"]),
        summary={"val_top1": 0.5, **dict.fromkeys(HOSTILE, 0.25), f"{SCRIPT}_lowest": 0.1, f"{SCRIPT}_highest": 0.4},
        notes=[*HOSTILE, f"see https://u:{SECRET}@host/"],
        attempts=[
            {"code": 1, "why": f"{END} {SECRET[:0]}https://u:{SECRET}@host", "step": 3, "seconds": 1.0},
            {"code": 0, "why": IMAGE, "step": 20, "seconds": 1.0, "start": 3},
        ],
        inputs=inputs,
    )
    draw_picture(run, "data-sheet", 0, SCRIPT, IMAGE)
    draw_picture(run, "a'\"<b>", 20, END, LINK)
    (run / "pictures" / "broken<script>-00000001.png").write_bytes(b"no picture")
    classes = [*HOSTILE, HOSTILE[0]]
    facts = {
        "step": 20,
        "split": SCRIPT,
        "num_images": 80,
        "classes": classes,
        "per_class": [{"class": name, "support": 10, "recall": 0.5, LINK: 0.1} for name in classes],
        "confusion": [[5 if at == row else 1 for at in range(len(classes))] for row in range(len(classes))],
    }
    (run / "evaluation.json").write_text(json.dumps(facts))
    write_lines(run / "refused.jsonl", [{"step": 4, "batch": 1, "samples": [1]}])
    write_lines(run / "rollbacks.jsonl", [{"time": 1.0, "to": 3, "refused": [4, 5], "batches": [1]}])
    write_lines(run / "quarantine.jsonl", [{"step": 6, "split": IMAGE, "shard": SCRIPT, "key": END, "reason": LINK}])
    write_lines(
        run / "stragglers.jsonl",
        [{"step": 2, "rank": rank, "host": SCRIPT, "step_seconds": 0.1 + rank, "data_wait": 0.1} for rank in (0, 1)],
    )
    write_lines(
        run / "nodes.jsonl",
        [
            {"step": step, "time": 1.0, "node": name, SCRIPT: 0.5, "gpu_load": 0.9}
            for step in (1, 2)
            for name in HOSTILE
        ],
    )
    return run


class PageReader(HTMLParser):
    """What a browser makes of a page: elements, their attributes, texts outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open = ""
        self.feed(page)
        self.text = "".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._open = tag

    def handle_data(self, data: str) -> None:
        if self._open not in ("script", "style"):
            self.texts.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def all_of(self, tag: str) -> list[dict[str, str]]:
        """The attributes of every element of a kind."""
        return [attributes for found, attributes in self.elements if found == tag]

    def dangers(self) -> list[str]:
        """What none of our pages has: handlers, addresses that run or leave, elements that load."""
        found = [
            f"{tag} {name}={value}"
            for tag, attributes in self.elements
            for name, value in attributes.items()
            if name.startswith("on") or value.strip().lower().startswith(("javascript:", "vbscript:"))
        ]
        found += [tag for tag, _ in self.elements if tag in ("iframe", "object", "embed", "form", "base", "b")]
        found += [image["src"] for image in self.all_of("img") if not image["src"].startswith("data:image/")]
        return found + [link["href"] for link in self.all_of("link") if link["href"] != "data:,"]
