"""A student as other benchmarks take it: eva, thunder and HEST.

`export` writes the few lines with which each evaluates the student as it is. They take timm's own
pooling, which is the student's embedding.
"""

import json
from pathlib import Path

from g2l.errors import UserError
from g2l.files import write_text

# Their placeholders are filled from the student's config.json.
EVA = """\
# The student for eva (pip install 'kaiko-eva[vision]'). In one of its configurations, such as
# configs/vision/pathology/offline/classification/bach.yaml, these lines take the place of
# `backbone:`, since eva's own registry passes no arguments on to the network. Then run it with
#   IN_FEATURES={width} RESIZE_DIM={size} NORMALIZE_MEAN='{mean}' NORMALIZE_STD='{std}'
backbone:
  class_path: eva.vision.models.TimmModel
  init_args:
    model_name: {architecture}
    checkpoint_path: {place}/model.safetensors
    model_kwargs: {kwargs}
"""
THUNDER = '''\
"""The student for thunder (pip install thunder-bench). Then, for instance:

    thunder benchmark custom:{path} bach knn
"""

import timm
from thunder.models.pretrained_models import PretrainedModel


class Student(PretrainedModel):
    def __init__(self):
        super().__init__()
        self.name = {name!r}
        self.emb_dim = {width}
        self.net = timm.create_model({weights!r}, pretrained=True)

    def get_transform(self):
        config = timm.data.resolve_model_data_config(self.net)
        return timm.data.create_transform(**config)

    def get_linear_probing_embeddings(self, x):
        return self.net(x)

    def get_segmentation_embeddings(self, x):
        return self.net.forward_features(x)[:, self.net.num_prefix_tokens :]
'''
HEST = '''\
"""The student for HEST-Benchmark, from its repository: PyPI's hest is another project, and a wheel
lacks a file that it reads.

    git clone https://github.com/mahmoodlab/HEST && pip install -e HEST
    python {path}

It fetches its patches (0.5 micrometres per pixel) and writes to eval/ST_pred_results.
"""

import timm
import torch
from hest.bench import benchmark

TASKS = "IDC PRAD PAAD SKCM COAD READ CCRCC LUNG LYMPH_IDC".split()  # those of its board

if __name__ == "__main__":
    student = timm.create_model({weights!r}, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(student))
    benchmark(
        student,
        transform,
        torch.float32,
        exp_code={name!r},
        datasets=TASKS,
        encoders=[],  # beside the student; else a ResNet50
        latent_dim={latent},  # of the PCA: 256, or all that the embedding has
    )
'''
TOOLS = {
    "eva": ("eva.yaml", EVA),
    "thunder": ("thunder_model.py", THUNDER),
    "hest": ("hest_benchmark.py", HEST),
}


def export(student: Path, tool: str, folder: Path) -> Path:
    """Write what `tool` needs to evaluate a student's folder; where it is.

    UserError where the folder holds none, or one whose embedding is not its network's own pooling.
    """
    try:
        config = json.loads((student / "config.json").read_text())
        facts = config["pretrained_cfg"]
        embedding = config["embedding"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{student}: no student of distill.py is in this folder") from None
    if tool == "eva" and config["num_classes"]:
        embedding = "projected"
    if embedding in ("cls+mean", "projected"):
        raise UserError(
            f"{student}: its embedding is {embedding}, and {tool} takes the network's own pooling"
        )
    name, text = TOOLS[tool]
    path = folder / name
    place = student.resolve()
    width = config["num_classes"] or config["num_features"]
    filled = text.format(
        path=path,
        name=config["g2l"]["run"],
        architecture=config["architecture"],
        weights=f"local-dir:{place}",
        width=width,
        latent=min(width, 256),
        place=place,
        kwargs=json.dumps(config["model_args"]),
        size=facts["input_size"][-1],
        mean=facts["mean"],
        std=facts["std"],
    )
    write_text(path, filled)
    return path
