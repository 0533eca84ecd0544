"""Prune a timm model, and read it back: python examples/timm_model.py [NAME]."""

import sys

import timm
import torch

import chanprune_ext as cpx


def main(name: str = "resnet18", file: str = "small.safetensors") -> torch.nn.Module:
    """Returns the pruned model as it comes back from its file."""
    # For trained weights: timm.create_model(name, pretrained=True)
    model = timm.create_model(name, pretrained=False, num_classes=10).eval()
    size = model.pretrained_cfg["input_size"]
    images = torch.randn(2, *size)

    plan = cpx.plan(model, images, budget=cpx.Budget(macs=0.5), round_to=8)
    pruned = plan.apply(model)
    print(plan)

    # Any unlabelled images of the task serve for the repair; random ones only show the call.
    cpx.compensate(pruned, model, [torch.randn(8, *size) for _ in range(2)])

    cpx.save(pruned, file)
    plain = timm.create_model(name, pretrained=False, num_classes=10)
    return cpx.load(file, plain).eval()


if __name__ == "__main__":
    main(*sys.argv[1:])
