"""MuwsCLI: LightningCLI with short ``--compress`` flags, for any module and data module."""

from __future__ import annotations

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_muws.callback import WeightUnificationCallback


class MuwsCLI(LightningCLI):
    """A LightningCLI that adds the callback to its Trainer and takes the callback's settings as ``--compress`` flags.

    ``MuwsCLI(MyModule)`` takes the arguments of LightningCLI. On the command line, give
    ``--compress.structure.prune_ratio=0.8``, ``--compress.rules rules.yaml`` or ``--compress.phases.admm_end=5``; in
    YAML, write a ``compress:`` section.
    """

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callback's settings to the settings of Trainer, module and data."""
        super().add_core_arguments_to_parser(parser)
        parser.add_lightning_class_args(WeightUnificationCallback, "compress")
