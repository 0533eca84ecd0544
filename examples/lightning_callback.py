"""Prune in the middle of a Lightning run; the optimizer keeps its state and goes on."""

import lightning as L
import torch
from torch import nn

import chanprune_ext as cpx


class Prune(L.Callback):
    """Removes channels of ``module.net`` before the given epoch."""

    def __init__(self, example: torch.Tensor, epoch: int, **options) -> None:
        self.example, self.epoch, self.options = example, epoch, options

    # On one device: on several, DistributedDataParallel holds the old shapes; prune before fit().
    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            example, optimizer = self.example.to(module.device), trainer.optimizers[0]
            cpx.prune(module.net, example, inplace=True, optimizer=optimizer, **self.options)


class Classifier(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def main(net: nn.Module, loader, epochs: int = 4, **options) -> nn.Module:
    prune = Prune(next(iter(loader))[0][:1], epoch=epochs // 2, ratio=0.5)
    L.Trainer(max_epochs=epochs, callbacks=[prune], **options).fit(Classifier(net), loader)
    return net
