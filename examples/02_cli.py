"""Compress a network from the command line: MuwsCLI is a LightningCLI with --compress.* flags, for any module.

Run: python examples/02_cli.py fit --compress.structure.prune_ratio=0.5 --trainer.max_epochs=10

It needs the extra cli: pip install 'lightning-muws[cli]'
"""

from lightning.pytorch.demos.boring_classes import BoringDataModule, DemoModel

from lightning_muws.cli import MuwsCLI

if __name__ == "__main__":
    MuwsCLI(DemoModel, BoringDataModule, trainer_defaults={"max_epochs": 10})  # Lightning's own default is 1,000
