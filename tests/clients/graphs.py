"""Graphs of torch_geometric: many small graphs with a label each, and one graph whose nodes have labels."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.clients.registry import Project, client


class GraphNet(pl.LightningModule):
    """Two graph convolutions with ReLU; for graphs, the mean over nodes and a head."""

    def __init__(self, classes: int, pooled: bool) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv

        self.first, self.second = GCNConv(4, 16), GCNConv(16, 16)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.head = nn.Linear(16, classes)
        self.pooled = pooled

    def forward(self, data: Any) -> Tensor:
        from torch_geometric.nn import global_mean_pool

        x = self.relu1(self.first(data.x, data.edge_index))
        x = self.relu2(self.second(x, data.edge_index))
        return self.head(global_mean_pool(x, data.batch) if self.pooled else x)

    def loss(self, data: Any, part: str) -> Tensor:
        logits, y = self(data), data.y
        if not self.pooled:
            logits, y = logits[data[part]], y[data[part]]
        return functional.cross_entropy(logits, y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch, "train_mask")

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch, "val_mask")
        self.log("val_loss", loss, batch_size=32)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def rings(num_graphs: int) -> list[Any]:
    """Rings of 6 to 12 nodes; the features of the nodes tell one of three classes."""
    from torch_geometric.data import Data

    graphs = []
    for number in range(num_graphs):
        size = int(torch.randint(6, 13, ()))
        nodes = torch.arange(size)
        edges = torch.stack([nodes, nodes.roll(1)])
        x = torch.randn(size, 4)
        x[:, number % 3] += 1
        graphs.append(Data(x=x, edge_index=torch.cat([edges, edges.flip(0)], 1), y=torch.tensor(number % 3)))
    return graphs


@client("pyg_graphs", "torch_geometric")
def graph_classification() -> Project:
    from torch_geometric.loader import DataLoader

    train, val = DataLoader(rings(96), 32, shuffle=True), DataLoader(rings(72), 32)
    return Project(GraphNet(3, pooled=True), {"train_dataloaders": train, "val_dataloaders": val})


@client("pyg_nodes", "torch_geometric")
def node_classification() -> Project:
    """One graph is the whole data: the same batch for training and validation, told apart by masks."""
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader

    y = torch.arange(150) % 3
    edges = torch.randint(0, 150, (2, 3000))
    edges = edges[:, (y[edges[0]] == y[edges[1]]) | (torch.rand(3000) < 0.1)]
    x = torch.randn(150, 4)
    x[torch.arange(150), y] += 1
    train = torch.rand(150) < 0.5
    loader = DataLoader([Data(x=x, edge_index=edges, y=y, train_mask=train, val_mask=~train)], 1)
    return Project(GraphNet(3, pooled=False), {"train_dataloaders": loader, "val_dataloaders": loader})
