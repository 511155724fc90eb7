"""Compress a transformer with the Trainer of Hugging Face, for a size. Run: python examples/04_transformers.py

The callback goes into the Trainer's list of callbacks; model, data and arguments stay as they are. The model is a small
BERT from a configuration, and the task is synthetic, so nothing is downloaded: which of four groups of tokens occurs
most often in a sequence?
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from lightning_muws import MicroStructure, Penalty, load_compressed
from lightning_muws.transformers import WeightUnificationCallback

N_TRAIN, N_TEST, LENGTH, GROUP, N_GROUPS = 8192, 2048, 13, 16, 4


def sequences(n: int, seed: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, GROUP * N_GROUPS, (n, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = F.one_hot(ids // GROUP, N_GROUPS).sum(1).argmax(1)
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


def accuracy(predicted) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(1) == predicted.label_ids).mean())}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, default=Path("output"), help="folder of the file and the checkpoints")
    options.add_argument("--compression", type=float, default=10.0, help="how many times smaller the file is")
    chosen = options.parse_args()

    set_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = BertConfig(vocab_size=GROUP * N_GROUPS, max_position_embeddings=16, num_labels=N_GROUPS, **sizes)
    model = BertForSequenceClassification(config)

    file = chosen.output / "transformer.muws"
    callback = WeightUnificationCallback(
        MicroStructure(block_shape=(4, 4)),
        penalty=Penalty(rho=0.03),  # so few steps need a stronger pull than the default
        compression=chosen.compression,
        save_to=file,
    )
    arguments = TrainingArguments(
        str(chosen.output / "checkpoints"),
        num_train_epochs=3,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        warmup_steps=20,
        save_strategy="epoch",  # a killed run goes on with trainer.train(resume_from_checkpoint=True)
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=sequences(N_TRAIN, seed=1),
        eval_dataset=sequences(N_TEST, seed=2),
        compute_metrics=accuracy,
        callbacks=[callback],
    )
    trainer.train()
    callback.verify()  # raises if a weight is outside its structure

    load_compressed(file, into=model)
    found = trainer.evaluate()["eval_accuracy"]
    print(f"accuracy {found:.3f} file_ratio {callback.saved.compression_ratio:.2f}")


if __name__ == "__main__":
    main()
