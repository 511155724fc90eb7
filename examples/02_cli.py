"""Compression from the command line, for any module.

Run: python examples/02_cli.py fit --compress.structure.block_shape=[2,4] --compress.structure.prune_ratio=0.5
"""

from lightning.pytorch.demos.boring_classes import BoringDataModule, DemoModel

from lightning_muws.cli import MuwsCLI

if __name__ == "__main__":
    MuwsCLI(DemoModel, BoringDataModule)
