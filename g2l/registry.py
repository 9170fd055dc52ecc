"""The published models: how each is built in timm, sees an image, and what its licence allows.

The facts are in registry.toml, with their sources; `Entry` says what each of them means, `table`
prints them, and `pretrained_on` tells which models have met the slides of a benchmark before.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from g2l.cohort import hashed_cohort
from g2l.files import aligned


@dataclass(frozen=True)
class Entry:
    """One published model."""

    hub: str  # repository on the Hugging Face hub
    timm: str  # architecture
    parameters: int
    prefix: int  # tokens before the patch tokens: CLS and registers
    dim: int  # width of the embedding
    norm: tuple  # mean, std
    licence: str
    # "gated": to be asked for on the model's page; "log in": sources disagree, some had to accept
    access: str
    pretrained_on: Sequence[str]  # collections of slides; "private" for its authors' own
    pretraining: str  # how many of them, and who says so
    args: dict = field(default_factory=dict)  # of timm's constructor, beside size and pooling
    # "cls", or "cls+mean": CLS beside the mean of the patch tokens, registers left out
    embedding: str = "cls"
    # of matrix products on a GPU: as published, bf16 where nothing is known
    precision: str = "bfloat16"
    resize: int = 224  # the shorter side is resized to this, then the middle 224 x 224 is taken
    interpolation: str = "bilinear"
    teaches: bool = True  # False: the licence forbids models trained on its outputs

    @property
    def width(self) -> int:
        """Of the network's tokens."""
        return self.dim // 2 if self.embedding == "cls+mean" else self.dim


FACTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
REGISTRY = {
    name: Entry(**facts | {"norm": FACTS["norms"][facts["norm"]]})
    for name, facts in FACTS["models"].items()
}

PLUS = " + "  # between the names of several teachers

# Of which collection the slides of a benchmark are, wholly or in part, whatever they are called.
DRAWN_FROM = {
    "tils": "TCGA",
    "tp53": "TCGA",
    "tiger": "TCGA",
    "bracs": "BRACS",
    "aggc": "AGGC2022",
}

NOTES = """
All take 224 x 224 RGB. cls+mean: class token beside the mean of the patch tokens, registers left
out. log in: sources disagree whether terms must be accepted. *: the licence forbids models trained
on its outputs; H-optimus-0 and Hibou are Apache-2.0. H-optimus-0 was trained at 0.5 µm/px, G2L
distils it at 0.25. The list: georg-wolflein/pathology-foundation-models; every source stands in
g2l/registry.toml. Weights: the hub's cache and token, or --weights [NAME=]FILE, FOLDER, random."""


def find(name: object) -> str | None:
    """Under which name the registry has a model, called so or by its repository on the hub."""
    wanted = str(name).lower().removeprefix("hf-hub:")
    for known, entry in REGISTRY.items():
        if wanted in (known, entry.hub.lower()):
            return known
    return None


def verdict(teacher: str) -> str:
    """What the licence of a teacher says of students."""
    known = find(teacher)
    if known is None:
        return f"{teacher} is not in the registry: read its licence before you share a student"
    entry = REGISTRY[known]
    rule = "does not forbid" if entry.teaches else "forbids"
    return (
        f"the licence of {known}, {entry.licence}, {rule} models trained on its outputs, as the "
        f"student is; its terms: https://huggingface.co/{entry.hub}"
    )


def lineage(name: str, metadata: Mapping) -> list[dict]:
    """Name, teacher, student and hashed cohort of a student called `name`, and of each that it was
    made from.

    `metadata`: what distill.py wrote of it; of another model there is nothing. A name may come
    again: a folder is made anew, or two machines call theirs alike.
    """
    if "teacher" not in metadata:
        return []
    pair = {part: str(metadata.get(part, "")) for part in ("teacher", "student")}
    cohort = {kind: hashed_cohort(metadata, kind) for kind in ("patients", "slides")}
    return [{"name": name, **pair, **cohort, "hashed": True}, *metadata.get("earlier", ())]


def origins(metadata: Mapping, part: str) -> list[str]:
    """What a student comes from, nearest first: its teachers (`part`: "teacher") or what it was at
    the start ("student"), and the same of every student that it was made from.
    """
    names = []
    for made in lineage("", metadata):
        names += made[part].split(PLUS)
    return list(dict.fromkeys(names))


def sources(name: str, metadata: Mapping) -> list[str]:
    """The networks that a model comes from and that are no students: by default itself alone."""
    made = {one["name"] for one in lineage(name, metadata)}
    names = [name, *origins(metadata, "teacher"), *origins(metadata, "student")]
    return [one for one in dict.fromkeys(names) if one not in made]


def licence_note(teacher: str) -> str:
    """A line on a teacher whose licence forbids students, to be said before there is one."""
    known = find(teacher)
    return "" if known is None or REGISTRY[known].teaches else f"note: {verdict(teacher)}"


def pretrained_on(
    models: Mapping[str, Mapping], benchmark: str, groups: Sequence[str]
) -> dict[str, list[str]]:
    """The models that may know a benchmark's slides from pretraining, and notes on how.

    `models`: what distill.py wrote of each by name, so that a student speaks for all it comes
    from; `groups`: patients or slides of the benchmark. Where slides are of a public collection, a
    model of which nothing is known may have met them; timm's own were made from other pictures.
    """
    of_tcga = any(group.upper().startswith("TCGA-") for group in groups)
    collection = "TCGA" if of_tcga else DRAWN_FROM.get(benchmark)
    notes: dict[str, list[str]] = {}
    for name, metadata in models.items():
        for source in sources(name, metadata):
            known = find(source)
            if known and collection in REGISTRY[known].pretrained_on:
                why = f"that was in its pretraining ({REGISTRY[known].pretraining})"
            elif collection and not known and not source.startswith("timm:"):
                why = "what it was pretrained on is not known"
            else:
                continue
            of = "" if source == name else f" comes from {known or source}, which"
            note = f"{name}{of} may know these slides, of {collection}: {why}"
            notes.setdefault(name, []).append(note)
    return notes


def table() -> str:
    """The registry as text, and a table of what its models were pretrained on and who says so."""
    rows = [["name", "   parameters", "embedding", " dim", "licence", "access", "hub"]]
    origins = [["name", "pretrained on", "how many, and who says so"]]
    for name, entry in REGISTRY.items():
        licence = entry.licence + " *" * (not entry.teaches)
        numbers = [f"{entry.parameters:13,}", entry.embedding, f"{entry.dim:4}"]
        rows.append([name, *numbers, licence, entry.access, entry.hub])
        origins.append([name, ", ".join(entry.pretrained_on), entry.pretraining])
    return aligned(rows) + "\n\n" + aligned(origins)
