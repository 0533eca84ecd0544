"""Models spread over several devices, as ``device_map="auto"`` does with large ones.

The meta device stands for the second one: what is there has shapes and no values.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext.devices import by_device
from chanprune_ext.surgery import sliced_like


class Spread(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))
        self.second = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).to("meta")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).to("meta"))
        return out


def test_a_model_on_two_devices_is_pruned_there() -> None:
    model = Spread().eval()
    pruned = cpx.prune(model, torch.randn(2, 6), 0.5, criterion="random")
    assert [layer.out_features for layer in (pruned.first[0], pruned.first[2])] == [8, 4]
    assert pruned.second[0].weight.shape == (8, 4)
    assert {p.device.type for p in pruned.first.parameters()} == {"cpu"}
    assert {p.device.type for p in pruned.second.parameters()} == {"meta"}


def test_tensors_are_sliced_where_they_are() -> None:
    tensors = [torch.randn(4, 6), torch.empty(5, 6, device="meta"), torch.randn(3, 6, 2)]
    assert by_device(tensors) == [[0, 2], [1]]
    columns = torch.tensor([0, 2, 5])
    kept = [{1: columns}, {0: torch.tensor([1]), 1: columns}, {1: columns, 2: torch.tensor([1])}]
    sliced = sliced_like(tensors, kept)
    assert torch.equal(sliced[0], tensors[0][:, columns])
    assert (sliced[1].shape, sliced[1].device.type) == ((1, 3), "meta")
    assert torch.equal(sliced[2], tensors[2][:, columns][:, :, 1:])


@pytest.mark.cuda
def test_weights_are_scored_where_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 3))
    x = torch.randn(2, 6)
    whole = cpx.plan(model, x, 0.5)
    model[2].cuda()
    model[2].register_forward_pre_hook(lambda _, args: (args[0].cuda(),))
    model[2].register_forward_hook(lambda *args: args[2].cpu())
    spread = cpx.plan(model, x, 0.5)
    for name, dims in whole.kept.items():
        assert all(torch.equal(kept, spread.kept[name][dim]) for dim, kept in dims.items())
    assert spread.apply(model)[2].weight.device.type == "cuda"
