"""Fine-tune an image classifier with transformers' Trainer, and pyvit's kernels in its model.

    python examples/hf_trainer.py --output_dir runs/hf                      # handwritten digits, a minute on a CPU
    python examples/hf_trainer.py --output_dir runs/hf --data_dir DIR --model_name_or_path google/vit-base-patch16-224

DIR has a folder of images for each class, within folders train and validation. Lines that use pyvit are marked.
"""

import copy
import json
import os
import sys
from dataclasses import dataclass, field

import numpy as np
import sample_data
import torch
from datasets import load_dataset
from speed import compare
from torchvision.transforms import Compose, Normalize, RandomResizedCrop, Resize, ToTensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

import pyvit  # pyvit


@dataclass
class Arguments:
    data_dir: str | None = field(default=None, metadata={"help": "folder of images (default: digits)"})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "a checkpoint's folder or name (default: a small ViT with random weights)"}
    )
    image_size: int = field(default=32, metadata={"help": "of the small ViT"})


def small_vit(num_labels: int, size: int):
    config = ViTConfig(
        image_size=size,
        patch_size=4,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=384,
        num_labels=num_labels,
    )
    return ViTForImageClassification(config), ViTImageProcessor(size={"height": size, "width": size})


def pretrained(name: str, labels: list[str]):
    model = AutoModelForImageClassification.from_pretrained(
        name,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
    )
    return model, AutoImageProcessor.from_pretrained(name)


def main():
    args, training = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses(
        [*DEFAULTS, *sys.argv[1:]]
    )
    set_seed(training.seed)
    root = args.data_dir or str(sample_data.digits())
    if not os.path.isdir(root):
        sys.exit(f"hf_trainer: data_dir must be a folder, got {root}")
    dataset = load_dataset("imagefolder", data_dir=root)
    if "validation" not in dataset:
        dataset = dataset["train"].train_test_split(0.2, seed=training.seed)
        dataset["validation"] = dataset.pop("test")
    labels = dataset["train"].features["label"].names

    if args.model_name_or_path is None:
        model, processor = small_vit(len(labels), args.image_size)
    else:
        model, processor = pretrained(args.model_name_or_path, labels)
    print(pyvit.accelerate(model))  # pyvit: same weights, its kernels; before Trainer wraps or compiles the model

    size = (processor.size["height"], processor.size["width"])
    normalize = [ToTensor(), Normalize(processor.image_mean, processor.image_std)]
    for split, first in (("train", RandomResizedCrop(size, scale=(0.7, 1.0))), ("validation", Resize(size))):
        transform = Compose([first, *normalize])
        dataset[split].set_transform(
            lambda batch, transform=transform: {
                "pixel_values": [transform(image.convert("RGB")) for image in batch["image"]],
                "labels": batch["label"],
            }
        )

    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, 1) == p.label_ids).mean())},
        processing_class=processor,
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    print(json.dumps({name: round(value, 4) for name, value in metrics.items()}))

    original = copy.deepcopy(model)
    pyvit.restore(original)  # pyvit: the same model without its kernels, for comparison
    batch = next(iter(trainer.get_train_dataloader()))
    steps = [lambda m=m: m(**batch).loss.backward() for m in (original, model)]
    compare(f"a training step of {len(batch['labels'])} images", *steps)


#: Where this example differs from TrainingArguments. The command line has priority.
DEFAULTS = [
    "--remove_unused_columns=False",
    "--num_train_epochs=10",
    "--per_device_train_batch_size=64",
    "--learning_rate=1e-3",
    "--warmup_steps=20",
    "--logging_steps=10",
    "--eval_strategy=epoch",
    "--report_to=none",
    f"--use_cpu={not torch.cuda.is_available()}",
]


if __name__ == "__main__":
    main()
