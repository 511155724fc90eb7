"""One thread, no deadline: the machine may be busy. Tables have every column, whatever the terminal's width."""

import os

import hypothesis
import torch

os.environ.pop("COLUMNS", None)  # pytest-xdist sets it for its workers
torch.set_num_threads(1)
hypothesis.settings.register_profile("suite", deadline=None, max_examples=60)
hypothesis.settings.load_profile("suite")
