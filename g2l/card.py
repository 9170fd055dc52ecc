"""The model card of a student: where it comes from and what shows that it was worth it.

`card` is README.md as the hub shows it, drawn from the student's config.json alone; `check_card`
draws it again and says where card, weights and config.json do not agree.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from g2l.errors import UserError
from g2l.files import read_json
from g2l.registry import PLUS, REGISTRY, find
from g2l.weights import tensors_digest

TOLD = (
    "revision",
    "device",
    "machine",
    "versions",
    "command",
)  # of the run's config.json
LOAD = """\
```python
import timm

model = timm.create_model("local-dir:PATH", pretrained=True).eval()  # or hf-hub:OWNER/NAME
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```"""


def hashed(name: str) -> str:
    """A patient's name so that who knows it can find it here, and nobody else reads it."""
    return hashlib.sha256(name.upper().encode()).hexdigest()[:16]


def _header(about: Mapping) -> dict:
    """What the hub reads, of a student whose metadata are `about`."""
    teachers = [find(name) for name in about["teacher"].split(PLUS)]
    student = find(about["student"])
    entries = [REGISTRY[name] for name in (student, *teachers) if name]
    # The student's own weights' licence, where no teacher's stands against it.
    free = student and all(name and REGISTRY[name].teaches for name in teachers)
    licence = entries[0].licence.lower() if free else ""
    return {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "license": licence if licence in ("apache-2.0", "mit") else "other",
        "tags": ["timm", "pathology", "knowledge-distillation"],
        "base_model": [entry.hub for entry in entries],
    }


def card(config: Mapping) -> str:
    """README.md of a student whose config.json says `config`."""
    about = config["g2l"]
    facts = config["card"]
    header = [f"{key}: {json.dumps(value)}" for key, value in _header(about).items()]
    of = f"{about['student']}, distilled from {about['teacher']} on the cohort {about['cancer']} in"
    lines = ["---", *header, "---", "", f"# {about['run']}", ""]
    lines += [f"{of} {about['steps']} steps.", "", LOAD]
    if config["num_classes"]:
        given = f"It gives {config['num_classes']} projected features, each standardised"
        lines += [
            "",
            f"{given}; CKA below is of its own {config['num_features']} before them.",
        ]
    lines += ["", "## Licences", "", *(f"- {told}" for told in facts["licences"])]
    lines += ["", "## Cohort", ""]
    lines.append(
        f"{len(about['slides'])} slides of {len(about['patients'])} patients, {facts['patches']:,} "
        f"patches; cohort {facts['cohort']}, tiled as {facts['tiles']}."
    )
    lines += [
        "Patients, each as the first 16 digits of the SHA-256 of its name in capitals:",
        "",
    ]
    lines += [f"- {hashed(patient)}" for patient in about["patients"]]
    lines += [
        "",
        f"## To the teacher: {facts['measure']}",
        "",
        "| step | CKA |",
        "|---|---|",
    ]
    lines += [f"| {step} | {cka:.4f} |" for step, cka in facts["curve"]]
    lines += ["", "| patient | patches | CKA at the end |", "|---|---|---|"]
    for patient, (count, cka) in facts["patients"].items():
        lines.append(f"| {patient} | {count} | {cka:.4f} |")
    mean, largest, biased = facts["floor"]
    chance = f"unbiased {mean:.4f} on average, {largest:.4f} at most; biased {biased:.4f}"
    lines += ["", f"By chance, with the same rows in random order: {chance}."]
    lines += ["", "## Made with", ""]
    lines += [f"- {name}: `{facts[name]}`" for name in TOLD]
    lines.append(f"- SHA-256 of the tensors: {config['sha256']}")
    return "\n".join(lines) + "\n"


def check_card(folder: Path) -> None:
    """Raise UserError where a student's README.md, weights and config.json do not agree.

    README.md may say more than it was written with.
    """
    config = read_json(folder / "config.json")
    wrong = []
    weights = folder / "model.safetensors"
    if not weights.is_file():
        wrong.append("model.safetensors is missing")
    elif tensors_digest(weights) != config.get("sha256"):
        wrong.append(
            "the tensors of model.safetensors are not those that config.json was written of"
        )
    try:
        text = (folder / "README.md").read_text(encoding="utf-8").splitlines()
        lost = [line for line in card(config).splitlines() if line not in text]
    except FileNotFoundError:
        wrong.append("README.md is missing")
    except (ValueError, LookupError, TypeError) as error:
        wrong.append(f"config.json does not say what a card is drawn from ({error!r})")
    else:
        if lost:
            wrong.append(f"README.md lacks {len(lost)} lines of config.json's, first {lost[0]!r}")
    if wrong:
        raise UserError(f"{folder}: {'; '.join(wrong)}")
