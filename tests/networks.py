"""Small networks and images for tests of models and features."""

import numpy as np
import torch

TINY = dict(embed_dim=32, depth=2, num_heads=2)


def images(n, height=64, width=64, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8))


def preprocess(model, images):
    """uint8 (B, 3, H, W) -> what the network takes, as every stage does it."""
    return model.normalize(model.geometry(images).float() / 255)


def batch(*arrays):
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
