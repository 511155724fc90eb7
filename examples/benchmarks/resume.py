"""Kills a training of MiniLM in transformers.Trainer, resumes it, and compares it with a training that nobody killed.

For each method: the weights of both runs have to be equal bit for bit, and the folder of `save_to_hub_folder` has to
give equal outputs in a process that never imports Lightning. It ends with an error if one of them differs.
Run: make check-resume (4 minutes; it fetches MiniLM, 90 MB).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from example_data import glosses
from machine import console, say_machine
from pretrained import MINILM_TOKENIZER, content, weights
from rich.table import Table

METHODS = ("straight_through", "admm")
EPOCHS, BATCH, SAMPLES = 5, 8, 48  # 30 steps
KILL_AT = 15  # in the middle of the third epoch
LOAD = """
import sys, torch
from lightning_muws.hub import load_pretrained
torch.set_num_threads(1)
model = load_pretrained(sys.argv[1]).eval()
assert not {"lightning", "pytorch_lightning"} & set(sys.modules), "Lightning was imported"
inputs, outputs = torch.load(sys.argv[2])
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, outputs), "other outputs"
"""


def train(folder: Path, method: str, how: str) -> None:
    """Train, and write the weights, the folder for the hub, and inputs with their outputs.

    Args:
        folder: Gets all of it, and the checkpoints.
        method: Of the phases.
        how: ``whole``, ``kill`` or ``resume``.
    """
    from tokenizers import Tokenizer
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    from lightning_muws import Phases
    from lightning_muws.hub import save_to_hub_folder
    from lightning_muws.transformers import WeightUnificationCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if how == "kill" and state.global_step == KILL_AT:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    set_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    model = BertForSequenceClassification(BertConfig(**shape, num_labels=2))
    given = {f"bert.{name}": x for name, x in weights("MiniLM-L6").items() if not name.endswith("position_ids")}
    model.load_state_dict(given, strict=False)  # the classifier is new
    tokenizer = Tokenizer.from_str(content(MINILM_TOKENIZER).decode())
    tokenizer.enable_truncation(24)
    tokenizer.enable_padding(length=24)
    samples = [
        {
            "input_ids": torch.tensor(coded.ids),
            "attention_mask": torch.tensor(coded.attention_mask),
            "labels": torch.tensor(len(word) % 2),
        }
        for word, text in glosses()[:SAMPLES]
        for coded in [tokenizer.encode(text)]
    ]
    callback = WeightUnificationCallback(compression=8, phases=Phases(method=method))
    settings = TrainingArguments(
        str(folder / "checkpoints"),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        learning_rate=5e-5,
        save_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, settings, train_dataset=samples, callbacks=[callback, Kill()])
    trainer.train(resume_from_checkpoint=how == "resume")
    callback.verify()
    torch.save(model.state_dict(), folder / "weights.pt")
    save_to_hub_folder(model, folder / "hub")
    inputs = {key: torch.stack([sample[key] for sample in samples[:4]]) for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.save((inputs, model.eval()(**inputs).logits), folder / "example.pt")


def run(folder: Path, method: str, how: str) -> int:
    """Train in a process of its own and return its exit status."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--worker", str(folder), method, how]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603  our own code
    expected = -signal.SIGKILL if how == "kill" else 0
    if done.returncode != expected:
        sys.exit(f"{method}, {how}: exit status {done.returncode}, not {expected}\n{done.stderr[-2000:]}")
    return done.returncode


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.worker:
        train(Path(chosen.worker[0]), *chosen.worker[1:])
        return
    say_machine()
    table = Table(title=f"MiniLM in transformers.Trainer, killed at step {KILL_AT} of {EPOCHS * SAMPLES // BATCH}")
    for header in ("method", "tensors", "differ from the whole run", "file, MB", "loaded without Lightning"):
        table.add_column(header, justify="right" if header else "left")
    wrong = []
    with tempfile.TemporaryDirectory() as temporary:
        for method in METHODS:
            whole, killed = Path(temporary) / f"{method}-whole", Path(temporary) / f"{method}-killed"
            run(whole, method, "whole")
            run(killed, method, "kill")
            run(killed, method, "resume")
            ours, theirs = (torch.load(folder / "weights.pt") for folder in (killed, whole))
            n_other = sum(not torch.equal(ours[name], theirs[name]) for name in theirs)
            command = [sys.executable, "-c", LOAD, str(killed / "hub"), str(killed / "example.pt")]
            loaded = subprocess.run(command, capture_output=True, text=True)  # noqa: S603  our own code
            says = "equal outputs" if loaded.returncode == 0 else loaded.stderr.strip().splitlines()[-1]
            n_bytes = (killed / "hub" / "model.muws").stat().st_size
            table.add_row(method, str(len(theirs)), str(n_other), f"{n_bytes / 1e6:.2f}", says)
            wrong += [method] if n_other or loaded.returncode else []
    console.print(table)
    if wrong:
        sys.exit(f"not the same: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
