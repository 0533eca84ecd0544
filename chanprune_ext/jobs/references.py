"""Published results that reports are drawn beside: where each is from, and what it began with.

"The article" is the one that this package began with; its shares of multiply-accumulates are those
of the ratios it names, on this package's count.
"""

from __future__ import annotations

from chanprune_ext.report import Reference

__all__ = ["MOBILENETV2_IMAGENET", "RESNET56_CIFAR10"]

_ARTICLE = "the article's own figures"
_PEER = "Torch-Pruning, reproduce/readme.md"

RESNET56_CIFAR10 = (
    Reference(
        "article, L1, no training", 0.8915 - 0.9302, 0.50, source=f"{_ARTICLE}: 93.02 to 89.15"
    ),
    Reference("article, 10 epochs", 0.9287 - 0.9302, 0.50, source=f"{_ARTICLE}: 93.02 to 92.87"),
    Reference(
        "article, 10 epochs with distillation",
        0.9312 - 0.9302,
        0.50,
        source=f"{_ARTICLE}: 93.02 to 93.12",
    ),
    Reference(
        "channel pruning, no training",
        -0.020,
        0.50,
        source="He, Zhang and Sun 2017: 92.8 to 90.8",
    ),
    Reference(
        "Torch-Pruning, 100 epochs", 0.9346 - 0.9353, 1 / 2.11, source=f"{_PEER}: 93.53 to 93.46"
    ),
    Reference(
        "Torch-Pruning, 100 epochs of sparsity and 100 more",
        0.9377 - 0.9353,
        1 / 2.13,
        source=f"{_PEER}: 93.53 to 93.77",
    ),
)

MOBILENETV2_IMAGENET = (
    Reference(
        "article, hidden channels -30 %, no training",
        0.682 - 0.718,
        0.70,
        latency_share=1 / 1.28,
        source=f"{_ARTICLE}: 71.8 to 68.2",
    ),
    Reference(
        "article, hidden channels -30 %, trained",
        0.713 - 0.718,
        0.70,
        latency_share=1 / 1.28,
        source=f"{_ARTICLE}: 71.8 to 71.3",
    ),
    Reference("AMC, 150 epochs", 0.7085 - 0.718, 0.70, source="He et al. 2018 and its repository"),
)
