"""The model card of a student: where it comes from and what shows that it was worth it.

`card` is README.md as the hub shows it, drawn from the student's config.json alone; `check_card`
draws it again and says where card, weights and config.json do not agree.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from g2l.cohort import hashed_cohort
from g2l.errors import UserError
from g2l.files import digest, read_json
from g2l.registry import PLUS, REGISTRY, find
from g2l.weights import tensors_digest

TOLD = (
    "revision",
    "device",
    "machine",
    "versions",
    "command",
)  # of the run's config.json
CARD = """\
---
{header}
---

# {about[run]}

{about[student]}, distilled from {about[teacher]} on the cohort {about[cancer]} in \
{about[steps]} steps.

```python
import timm

model = timm.create_model("local-dir:PATH", pretrained=True).eval()  # or hf-hub:OWNER/NAME
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```
{projected}
## Licences

{licences}

## Cohort

{slides} slides of {patients} patients, {facts[patches]:,} patches; cohort {facts[cohort]}, \
tiled as {facts[tiles]}.
Patients, each as the first 16 digits of the SHA-256 of its name in capitals:

{names}

## To the teacher: {facts[measure]}

| step | CKA |
|---|---|
{curve}

| patient | patches | CKA at the end |
|---|---|---|
{each}
By chance, with the same rows in random order: unbiased {facts[floor][0]:.4f} on average, \
{facts[floor][1]:.4f} at most; biased {facts[floor][2]:.4f}.

## Made with

{made}
- SHA-256 of the tensors: {config[sha256]}; digest of what config.json says: {said}
"""
PROJECTED = """
It gives {num_classes} projected features, each standardised; CKA below is of its own \
{num_features} before them.
"""


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
    header = _header(about).items()
    each = facts["patients"].items()
    return CARD.format(
        config=config,
        said=digest(config),
        about=about,
        facts=facts,
        header="\n".join(f"{key}: {json.dumps(value)}" for key, value in header),
        projected=PROJECTED.format(**config) if config["num_classes"] else "",
        licences="\n".join(f"- {told}" for told in facts["licences"]),
        slides=len(about["slides"]),
        patients=len(about["patients"]),
        names="\n".join(f"- {name}" for name in hashed_cohort(about, "patients")),
        curve="\n".join(f"| {step} | {cka:.4f} |" for step, cka in facts["curve"]),
        each="".join(f"| {name} | {count} | {cka:.4f} |\n" for name, (count, cka) in each),
        made="\n".join(f"- {name}: `{facts[name]}`" for name in TOLD),
    )


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
        text = (folder / "README.md").read_text("utf-8", "replace").splitlines()
        lost = [line for line in card(config).splitlines() if line not in text]
    except FileNotFoundError:
        wrong.append("README.md is missing")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        wrong.append(f"config.json does not say what a card is drawn from ({error!r})")
    else:
        if lost:
            wrong.append(f"README.md lacks {len(lost)} lines of config.json's, first {lost[0]!r}")
    if wrong:
        raise UserError(f"{folder}: {'; '.join(wrong)}")
