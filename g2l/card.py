"""The model card of a student: where it comes from and what shows that it was worth it.

`card` is README.md as the hub shows it, drawn from the student's config.json alone; `check_card`
draws it again and says where card, weights and config.json do not agree.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from g2l.errors import UserError
from g2l.files import read_json, write_text
from g2l.registry import REGISTRY, find
from g2l.weights import tensors_digest

LOAD = """\
```python
import timm

model = timm.create_model("local-dir:PATH", pretrained=True).eval()  # or hf-hub:OWNER/NAME
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```"""


def hashed(name: str) -> str:
    """A patient's name so that who knows it can find it here, and nobody else reads it."""
    return hashlib.sha256(name.upper().encode()).hexdigest()[:16]


def licence_of(metadata: Mapping) -> str:
    """For the card's header: that of the student's own weights, where no teacher's stands against
    it."""
    teachers = [find(name) for name in str(metadata.get("teacher")).split(" + ")]
    student = find(metadata.get("student"))
    free = all(name and REGISTRY[name].teaches for name in teachers)
    licence = REGISTRY[student].licence if student else ""
    return licence.lower() if free and licence in ("Apache-2.0", "MIT") else "other"


def card(config: Mapping) -> str:
    """README.md of a student whose config.json says `config`."""
    facts = config["g2l"]
    known = [find(name) for name in (facts["student"], *facts["teacher"].split(" + "))]
    header = {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "license": licence_of(facts),
        "tags": ["timm", "pathology", "knowledge-distillation"],
        "base_model": [REGISTRY[name].hub for name in known if name],
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---"]
    lines += ["", f"# {facts['run']}", "", f"{facts['student']}, distilled from {facts['teacher']}"]
    lines[-1] += f" on the cohort {facts['cancer']} in {facts['steps']} steps."
    if config["num_classes"]:
        lines.append(
            f"It gives {config['num_classes']} projected features, each standardised; CKA below is "
            f"of the {config['num_features']} before them, which the student beside it gives."
        )
    lines += ["", LOAD, "", "## Teacher and licence", ""]
    lines += [f"- {verdict}" for verdict in facts["licences"]]
    cohort = facts["cohort"]
    lines += ["", "## Cohort", ""]
    lines.append(
        f"{cohort['slides']} slides of {len(facts['patients'])} patients, {cohort['patches']:,} "
        f"patches; cohort {cohort['digest']}, tiled as {cohort['tiles']}."
    )
    lines += ["Patients, each as the first 16 digits of the SHA-256 of its name in capitals:", ""]
    lines += [f"- {hashed(patient)}" for patient in facts["patients"]]
    lines += ["", f"## {facts['measure']} to the teacher", "", "| step | CKA |", "|---|---|"]
    lines += [f"| {step} | {cka:.4f} |" for step, cka in facts["curve"]]
    lines += ["", "| patient | patches | CKA at the end |", "|---|---|---|"]
    for patient, (count, cka) in facts["proof"]["patients"].items():
        lines.append(f"| {hashed(patient)} | {count} | {cka:.4f} |")
    floor = "chance, by the same rows in random order: unbiased {0:.4f}, {1:.4f} at most; biased {2:.4f}"
    lines += ["", floor.format(*facts["proof"]["floor"]).capitalize() + "."]
    lines += ["", "## Made with", ""]
    for name in ("revision", "device", "machine", "versions", "command"):
        lines.append(f"- {name}: `{facts[name]}`")
    lines.append(f"- SHA-256 of the tensors: {config['sha256']}")
    return "\n".join(lines) + "\n"


def write_card(folder: Path) -> None:
    """README.md of the student in a folder."""
    write_text(folder / "README.md", card(read_json(folder / "config.json")))


def is_student(folder: Path) -> bool:
    """Whether a folder holds a student of ours."""
    return folder.is_dir() and "g2l" in read_json(folder / "config.json")


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
