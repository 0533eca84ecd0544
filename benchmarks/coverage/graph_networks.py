"""Graph networks of torch_geometric: features of nodes, on a ring of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.case import Case, images

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["cases"]

_NODES, _FEATURES = 10, 16
_NETWORKS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("GCN", "GCN", {}),
    ("GraphSAGE", "GraphSAGE", {}),
    ("GIN", "GIN", {}),
    ("GAT", "GAT", {"heads": 4}),
    ("GATv2", "GAT", {"heads": 4, "v2": True}),
    (
        "PNA",
        "PNA",
        {
            "aggregators": ["mean", "max"],
            "scalers": ["identity"],
            "deg": torch.tensor([0, 0, _NODES]),
        },
    ),
    ("EdgeCNN", "EdgeCNN", {}),
    ("GCN all layers joined", "GCN", {"jk": "cat"}),
    ("GCN all layers through an LSTM", "GCN", {"jk": "lstm"}),
    ("GIN batch norm", "GIN", {"norm": "BatchNorm"}),
    ("GCN graph norm", "GCN", {"norm": "graph_norm"}),
)
_LAYERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("TransformerConv", {"heads": 2}),
    ("ChebConv", {"K": 3}),
    ("TAGConv", {}),
    ("ARMAConv", {}),
    ("SGConv", {}),
    ("GraphConv", {}),
    ("LEConv", {}),
    ("ClusterGCNConv", {}),
    ("FeaStConv", {}),
    ("ResGatedGraphConv", {}),
    ("GENConv", {}),
    ("FiLMConv", {}),
    ("SuperGATConv", {"heads": 2}),
    ("EGConv", {"num_heads": 4, "num_bases": 2}),
    ("MFConv", {}),
    ("GeneralConv", {}),
    ("SSGConv", {"alpha": 0.1}),
)


class _Ring(nn.Module):
    """A network on nodes that have two neighbours each."""

    edges: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        here = torch.arange(_NODES)
        edges = torch.stack([here, (here + 1) % _NODES])
        self.register_buffer("edges", torch.cat([edges, edges.flip(0)], 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x, self.edges)
        return out


class _TwoLayers(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        heads = options.get("heads", 1)
        self.first = kind(_FEATURES, 32, **options)
        self.second = kind(32 * heads, 24, **options)
        self.out = nn.Linear(24 * heads, 5)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        out: Tensor = self.out(self.second(self.first(x, edges).relu(), edges).relu())
        return out


def _network(kind: str, options: dict[str, Any]) -> nn.Module:
    import torch_geometric.nn

    return _Ring(getattr(torch_geometric.nn, kind)(_FEATURES, 32, 3, 5, **options))


def _layers(kind: str, options: dict[str, Any]) -> nn.Module:
    import torch_geometric.nn

    return _Ring(_TwoLayers(getattr(torch_geometric.nn, kind), **options))


def cases() -> Iterator[Case]:
    """Whole networks of three layers, and two layers of every other kind."""
    made = [(name, lambda k=k, o=o: _network(k, o)) for name, k, o in _NETWORKS]
    made += [(name, lambda k=name, o=options: _layers(k, o)) for name, options in _LAYERS]
    for name, build in made:
        nodes = images(_NODES, _FEATURES)
        yield Case(f"torch_geometric:{name}", build, nodes, family="torch_geometric")
