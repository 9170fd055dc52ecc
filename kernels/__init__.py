"""Three kernels that are useful alone: the projector with the Log-Sum loss, CKA, and exact nearest neighbours.

    from kernels import cka, covariance, knn, log_sum_loss

Each runs in plain PyTorch on any device and as Triton kernels on a GPU. The environment variable G2L_KERNELS chooses:
`auto` (Triton on a GPU where it is installed), `triton` (an error where it cannot run) or `torch`. Mathematics, design
and measurements are in kernels/README.md; `python -m kernels.bench` measures on your own machine.
"""

from kernels.cka import cka, covariance
from kernels.knn import knn
from kernels.logsum import log_sum_loss

__all__ = ["cka", "covariance", "knn", "log_sum_loss"]
