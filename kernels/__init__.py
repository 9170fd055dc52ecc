"""Three kernels that are useful alone: the loss with its projector, CKA, and exact neighbours.

    from kernels import cka, covariance, knn, log_sum_loss

Each runs in plain PyTorch on any device and as Triton kernels on a GPU. The environment variable
G2L_KERNELS chooses: `auto` (Triton on a GPU where it is installed), `triton` (an error where it
cannot run) or `torch`. Mathematics, design and measurements are in kernels/README.md;
`python -m kernels.bench` measures on your own machine.
"""

from kernels.cka import cka, covariance
from kernels.knn import knn
from kernels.logsum import LogSumLoss, log_sum_loss

# Below 0.1 on purpose: transformers takes this folder for a package of PyPI that has the same name,
# and finds it too old to be used. See kernels/README.md.
__version__ = "0.0.1"
__all__ = ["LogSumLoss", "cka", "covariance", "knn", "log_sum_loss"]
