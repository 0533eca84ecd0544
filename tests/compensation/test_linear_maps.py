"""Convolutions computed from their geometry, in either layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from chanprune_ext.compensation.linear_maps import linear_map


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (1, {}),
        (1, {"stride": 2}),
        (1, {"padding": 1}),
        (3, {"padding": 1}),
        (3, {"padding": (0, 2), "stride": (2, 1)}),
        (4, {"padding": "same"}),  # one zero more behind than before
        (3, {"padding": 1, "groups": 2}),
        (1, {"groups": 2}),
    ],
)
def test_a_call_with_other_weights_and_its_gradients(kernel, options, layout):
    x = torch.randn(3, 4, 7, 6, dtype=torch.float64).contiguous(memory_format=layout)
    groups = options.get("groups", 1)
    weight = torch.randn(6, 4 // groups, kernel, kernel, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64)
    geometry, _ = linear_map("conv2d", (x, weight, bias), options)
    results = []
    for call in (F.conv2d, None):
        parts = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
        y = call(*parts, **options) if call else geometry.apply(*parts)
        results.append((y, *torch.autograd.grad(y.square().sum(), parts)))
    for ours, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, expected)
