"""The command line: LightningCLI with short --compress flags, for any module and data module."""

from __future__ import annotations

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_muws.callback import WeightUnificationCallback


class MuwsCLI(LightningCLI):
    """A LightningCLI whose Trainer has the callback, with its settings as ``--compress.*`` flags.

    ``MuwsCLI(MyModule)`` takes what LightningCLI takes, and then ``--compress.structure.prune_ratio=0.8``,
    ``--compress.rules rules.yaml``, ``--compress.phases.admm_end=5`` and so on, or a ``compress:`` section in YAML.
    """

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callback's settings to those of Trainer, module and data."""
        super().add_core_arguments_to_parser(parser)
        parser.add_lightning_class_args(WeightUnificationCallback, "compress")
