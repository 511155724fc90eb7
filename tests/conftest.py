"""One thread, no deadline: the machine may be busy."""

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("suite", deadline=None, max_examples=60)
hypothesis.settings.load_profile("suite")
