"""Recover a pruned network: torchrun --nproc-per-node 8 examples/several_gpus.py FOLDER_OF_IMAGES

The same command goes on where a run was stopped, and without torchrun one process does it all.
"""

import os
import sys

import torch

import chanprune_ext as cpx
from chanprune_ext.data import open_dataset
from chanprune_ext.models import resnet20


def main(data: str = "digits", epochs: str = "3", file: str = "recovered.safetensors") -> None:
    torch.manual_seed(0)  # every process makes the same networks
    train, val = open_dataset(data, "train", augment=True), open_dataset(data)
    model = resnet20(train.num_classes, train.shape[0])  # or yours, trained
    pruned = cpx.prune(model, train[0][0][None], ratio=0.5)

    # Each process takes batches of its own; all end with the same weights.
    recipe = cpx.Recipe(batch_size=32, precision="bf16", lr_scale="linear", lr_base_size=128)
    result = cpx.recover(
        pruned,
        train=train,
        val=val,
        recipe=recipe.changed(epochs=int(epochs)),
        checkpoint_dir=f"{file}.checkpoints",
        resume="auto",
    )
    if os.environ.get("RANK", "0") == "0":
        cpx.save(pruned, file)
        print(f"top-1 {100 * result.last.top1:.1f} %, {result.history[-1].images} images an epoch")


if __name__ == "__main__":
    main(*sys.argv[1:])
