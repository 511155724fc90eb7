"""Compress a network from the command line: MuwsCLI is a LightningCLI with --compress.* flags, for any module.

Run: python examples/02_cli.py fit --compress.structure.block_shape=[2,4] --compress.structure.prune_ratio=0.5

It needs the extra cli: pip install 'lightning-muws[cli]'
"""

from lightning.pytorch.demos.boring_classes import BoringDataModule, DemoModel

from lightning_muws.cli import MuwsCLI

if __name__ == "__main__":
    MuwsCLI(DemoModel, BoringDataModule, trainer_defaults={"max_epochs": 10})  # Lightning's default is 1,000
