"""Settings with which the built-in data sets train in minutes on a CPU, with the models of :mod:`pyvit.models.pico`."""

from __future__ import annotations

from typing import Any

#: Default models of the built-in data sets; RECIPE_MODELS has those of recipes that need another one, with "" for data
#: that is not built in.
MODELS = {
    "digits": "vit_pico_patch8_32",
    "emoji": "vit_pico_patch8_64",
    "fashion-mnist": "vit_pico_patch4_28",
    "icons": "vit_pico_patch8_64",
    "scenes": "vit_pico_patch8_64",
    "words": "ast_pico_patch16_128x64",
    "synthetic": "vit_small_patch16_224",
}
RECIPE_MODELS = {
    ("mae", "words"): "vit_pico_patch8_32",  # MAE needs patches that do not overlap, unlike AST's
    ("clip", ""): "clip_vit_base_patch32_224",
    ("siglip", ""): "siglip_vit_base_patch16_224",
    ("clip", "digits"): "clip_pico_patch8_32",
    **{("clip", data): "clip_pico_patch8_64" for data in ("emoji", "icons", "scenes")},
    ("siglip", "digits"): "siglip_pico_patch8_32",
    **{("siglip", data): "siglip_pico_patch8_64" for data in ("emoji", "icons", "scenes")},
}

_MILD = {"augment": "mild", "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0}
_SELF_DISTILLATION = {
    "prototypes": 512, "hidden": 256, "bottleneck": 64, "local_crops": 2, "local_size": 24, "global_crop": 0.6,
    "local_crop": 0.35, "drop_path": 0.0, "distort": False, "slant": 15.0, "momentum": 0.99, "weight_decay_end": 0.1,
}  # fmt: skip
_FASHION_MNIST = {"lr": 2e-3, "warmup": 0.05, "optimizer": "muon"}
_SHORT = {"epochs": 60, "batch_size": 128, "lr": 1e-3, "warmup": 0.1}

_PICTURES = {
    "epochs": 40, "batch_size": 256, "lr": 2e-3, "warmup": 0.1, "weight_decay": 0.2, "optimizer": "muon",
    "option": {"tokenizer": "bpe", "context": 24, "crop": 0.6},
}  # fmt: skip

#: PRESETS[recipe, data]: Config fields, and recipe options under "option", that replace the recipe's defaults.
PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("supervised", "digits"): {"epochs": 60, "batch_size": 64, "lr": 1.5e-3, "warmup": 0.1, "option": _MILD},
    ("supervised", "words"): {
        "epochs": 60,
        "batch_size": 16,
        "lr": 1e-3,
        "warmup": 0.1,
        "option": {**_MILD, "augment": "none"},
    },
    ("supervised", "fashion-mnist"): {
        **_FASHION_MNIST,
        "epochs": 6,
        "batch_size": 128,
        "option": {**_MILD, "augment": "flip"},
    },
    ("finetune", "fashion-mnist"): {
        "epochs": 60,
        "batch_size": 64,
        "lr": 1e-3,
        "warmup": 0.1,
        "optimizer": "muon",
        "option": _MILD,
    },
    ("linear", "fashion-mnist"): {
        "epochs": 20,
        "batch_size": 256,
        "lr": 0.1,
        "optimizer": "sgd",
        "option": {"crop": 0.8},
    },
    ("mae", "fashion-mnist"): {
        **_FASHION_MNIST,
        "epochs": 8,
        "batch_size": 256,
        "option": {"decoder_dim": 48, "decoder_depth": 2, "decoder_heads": 3, "crop": 0.6},
    },
    ("simclr", "fashion-mnist"): {
        **_FASHION_MNIST,
        "epochs": 6,
        "batch_size": 256,
        "weight_decay": 0.05,
        "option": {"hidden": 256, "out": 64, "crop": 0.5, "strength": 0.5, "temperature": 0.07},
    },
    ("dino", "fashion-mnist"): {
        **_FASHION_MNIST,
        "epochs": 6,
        "batch_size": 128,
        "option": {
            **_SELF_DISTILLATION,
            "batch_norm": True,
            "centering": "sinkhorn_knopp",
            "distort": True,
            "freeze_last": 0.2,
            "global_crop": 0.5,
            "local_crops": 0,
            "local_size": 16,
            "momentum": 0.98,
            "prototypes": 1024,
            "slant": 0.0,
            "solarize": 0.0,
        },
    },
    ("dinov2", "fashion-mnist"): {
        **_FASHION_MNIST,
        "epochs": 4,
        "batch_size": 128,
        "warmup": 0.1,
        "option": {
            **_SELF_DISTILLATION,
            "distort": True,
            "freeze_last": 0.2,
            "global_crop": 0.5,
            "layer_scale": 0.0,
            "local_crops": 0,
            "local_size": 16,
            "momentum": 0.98,
            "prototypes": 1024,
            "slant": 0.0,
            "solarize": 0.0,
        },
    },
    ("finetune", "digits"): {"epochs": 30, "batch_size": 64, "lr": 1e-3, "option": _MILD},
    ("linear", "digits"): {"epochs": 30, "batch_size": 128, "lr": 0.1, "optimizer": "sgd", "option": {"crop": 0.8}},
    ("mae", "digits"): {
        **_SHORT,
        "epochs": 300,
        "option": {"decoder_dim": 48, "decoder_depth": 2, "decoder_heads": 3, "crop": 0.6, "slant": 10.0},
    },
    ("simclr", "digits"): {
        **_SHORT,
        "lr": 2e-3,
        "option": {
            "hidden": 256,
            "out": 64,
            "crop": 0.6,
            "slant": 15.0,
            "strength": 0.5,
            "temperature": 0.2,
        },
    },
    ("dino", "digits"): {
        **_SHORT,
        "batch_size": 64,
        "lr": 2e-3,
        "option": {**_SELF_DISTILLATION, "momentum": 0.97, "batch_norm": True, "local_crops": 0},
    },
    ("dinov2", "digits"): {**_SHORT, "batch_size": 64, "option": {**_SELF_DISTILLATION, "layer_scale": 1e-2}},
    ("clip", "digits"): {**_SHORT, "epochs": 20, "weight_decay": 0.1, "option": {"context": 32}},
    ("siglip", "digits"): {**_SHORT, "option": {"context": 32}},
    **{("clip", data): _PICTURES for data in ("emoji", "icons")},
    **{("siglip", data): {**_PICTURES, "epochs": 60} for data in ("emoji", "icons")},
    ("clip", "scenes"): {**_SHORT, "epochs": 12, "weight_decay": 0.1, "optimizer": "muon", "lr": 2e-3},
    ("siglip", "scenes"): {**_SHORT, "epochs": 12, "weight_decay": 0.1, "optimizer": "muon", "lr": 2e-3},
}
