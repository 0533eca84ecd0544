"""Blocks found from coupling groups, in networks people use and in the repository's toys."""

from __future__ import annotations

import pytest
import torch
import torchvision
import toys  # noqa: F401 - registers the toys
from torch import Tensor, nn
from toy_registry import TOYS

import chanprune_ext
from chanprune_ext.errors import ChanpruneError
from chanprune_ext.models import resnet20
from chanprune_ext.reconstruction.blocks import Block, find_blocks
from chanprune_ext.reconstruction.passages import entry_order


def found(model: nn.Module, inputs: object) -> tuple[list[Block], dict[str, str]]:
    model.eval()
    plan = chanprune_ext.plan(model, inputs, ratio=0.5)
    with torch.no_grad():
        return find_blocks(model, plan.groups, entry_order(model, inputs))


def names(model: nn.Module, side: int = 64) -> list[str]:
    blocks, left = found(model, torch.randn(2, 3, side, side))
    assert not left
    return [block.name for block in blocks]


def torchvision_model(name: str) -> nn.Module:
    return getattr(torchvision.models, name)(weights=None, num_classes=10)


def test_inverted_residuals_of_mobilenet_v2() -> None:
    assert names(torchvision_model("mobilenet_v2")) == [
        "features.0 to features.1",
        *(f"features.{i}" for i in range(2, 17)),
        "features.17 to features.18",
        "classifier",
    ]


@pytest.mark.parametrize(("name", "depths"), [("resnet18", [2] * 4), ("resnet50", [3, 4, 6, 3])])
def test_residual_blocks_of_resnets(name: str, depths: list[int]) -> None:
    expected = [f"layer{s + 1}.{i}" for s, depth in enumerate(depths) for i in range(depth)]
    assert names(torchvision_model(name)) == ["conv1", *expected, "fc"]


def test_cifar_resnet() -> None:
    expected = [f"layer{s}.{i}" for s in (1, 2, 3) for i in range(3)]
    assert names(resnet20(), 32) == ["conv1", *expected, "linear"]


def test_dense_layers() -> None:
    found_names = names(torchvision_model("densenet121"))
    assert "features.denseblock1.denselayer1" in found_names
    assert "features.denseblock4.denselayer16" in found_names
    assert "features.transition1" in found_names


def test_a_chain_of_convolutions_is_cut_into_pairs() -> None:
    blocks, _ = found(torchvision_model("vgg11_bn"), torch.randn(2, 3, 64, 64))
    assert [b.name for b in blocks][:2] == ["features.0 to features.7", "features.8 to features.14"]
    assert [len(b.layers) for b in blocks] == [2, 2, 2, 2, 3]
    assert blocks[0].modules == tuple(f"features.{i}" for i in range(8))


def test_layers_of_a_vision_transformer() -> None:
    model = torchvision.models.VisionTransformer(32, 8, 3, 2, 32, 64, num_classes=5)
    blocks, left = found(model, torch.randn(2, 3, 32, 32))
    layers = [f"encoder.layers.encoder_layer_{i}" for i in range(3)]
    assert [b.name for b in blocks] == ["conv_proj", *layers, "heads"]
    assert set(left) <= {"", "encoder"}  # class token and positions


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet50", "efficientnet_b0", "swin_t"])
def test_every_layer_is_in_one_block(name: str) -> None:
    model = torchvision_model(name)
    blocks, left = found(model, torch.randn(2, 3, 64, 64))
    for path, module in model.named_modules():
        if any(p.dim() > 1 for p in module.parameters(recurse=False)):
            holders = [block.name for block in blocks if path in block.layers]
            assert len(holders) == (path not in left), path


@pytest.mark.parametrize("name", sorted(TOYS))
def test_blocks_of_toys_do_not_overlap_and_run_once(name: str) -> None:
    toy = TOYS[name]
    torch.manual_seed(0)
    model, inputs = toy.make().eval(), toy.inputs()
    try:
        blocks, left = found(model, inputs)
    except ChanpruneError:
        pytest.skip("nothing of it can be pruned")
    with torch.no_grad():
        order = entry_order(model, inputs)
    modules = dict(model.named_modules())
    taken: set[str] = set()
    for block in blocks:
        assert block.modules
        assert not block.layers & taken
        taken |= block.layers
        assert all(len(order[path]) == 1 for path in block.modules)
        if len(block.modules) > 1:
            parents = {path.rpartition(".")[0] for path in block.modules}
            assert len(parents) == 1
            assert isinstance(modules[parents.pop()], nn.Sequential)
        assert "" not in block.modules
    weighted = {
        path
        for path, module in modules.items()
        if any(p.dim() > 1 for p in module.parameters(recurse=False))
    }
    assert weighted == taken | set(left)
    firsts = [order[block.modules[0]][0] for block in blocks]
    assert firsts == sorted(firsts)


def test_a_layer_that_runs_twice_is_in_no_block() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.out = nn.Conv2d(3, 8, 3)
            self.last = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.out(self.conv(self.conv(x)))))

    blocks, left = found(Twice(), torch.randn(2, 3, 8, 8))
    assert [b.name for b in blocks] == ["out", "last"]
    assert left == {"conv": "it runs 2 times in one forward"}
