"""Keys and options of other programs, and of earlier versions of this one, with what to write instead."""

from collections.abc import Mapping
from typing import Any

RENAMED = {  # keys of earlier versions, with what to write now
    "model.survival": "model.drop_path_rate (1 - survival)",
    "optimizer.ema": "optimizer.ema_decay",
    "train.accumulation": "train.gradient_accumulation_steps",
    "train.keep_checkpoints": "train.max_checkpoints",
    "train.restore_best": "train.restore_best_weights",
    "train.stages.augment": "train.stages.use_augmentation",
    "tracking.register": "tracking.registered_model_name",
    "runtime.input_workers": "runtime.num_workers",
    "data.on_bad": "data.on_bad_image",
}
RENAMED_VALUES = {
    ("runtime.strategy", "one"): "single",
    ("data.on_bad_image", "fail"): "error",
}  # values of earlier versions, with what to write now
SAME_VALUE = {  # keys of other programs whose value stays the same
    "architecture": "model.variant",
    "arch": "model.variant",
    "variant": "model.variant",
    "backbone": "model.variant",
    "model_name": "model.variant",
    "img_size": "model.resolution",
    "image_size": "model.resolution",
    "imgsz": "model.resolution",
    "input_size": "model.resolution",
    "resolution": "model.resolution",
    "drop_path": "model.drop_path_rate",
    "drop_path_rate": "model.drop_path_rate",
    "dropout": "model.dropout",
    "drop_rate": "model.dropout",
    "dropout_rate": "model.dropout",
    "weights": "model.weights",
    "data": "data.path",
    "data_dir": "data.path",
    "data_path": "data.path",
    "dataset": "data.path",
    "epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_epochs": "train.epochs",
    "batch": "train.global_batch_size",
    "batch_size": "train.global_batch_size",
    "train_batch_size": "train.global_batch_size",
    "label_smoothing": "train.label_smoothing",
    "smoothing": "train.label_smoothing",
    "class_weight": "train.class_weights",
    "accumulate_grad_batches": "train.gradient_accumulation_steps",
    "grad_accum_steps": "train.gradient_accumulation_steps",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "opt": "optimizer.name",
    "optimizer": "optimizer.name",
    "weight_decay": "optimizer.weight_decay",
    "warmup_epochs": "optimizer.warmup_epochs",
    "mixup": "augment.mixup",
    "cutmix": "augment.cutmix",
    "workers": "runtime.num_workers",
    "num_workers": "runtime.num_workers",
    "precision": "runtime.precision",
    "experiment": "tracking.experiment",
    "experiment_name": "tracking.experiment",
}
LEARNING_RATES = ("lr", "learning_rate", "initial_lr", "lr0")
REFERENCE_BATCH_SIZE = 256  # images, of optimizer.base_lr


def renamed(key: str) -> str | None:
    """Return what a key of an earlier version is now, or None."""
    return RENAMED.get(key)


def suggest_key(name: str, value: Any, config: Mapping[str, Any]) -> str | None:
    """Return what to write for a key or option of another program, or None if its name is not known.

    Args:
        name: Last part of the key, such as lr or batch_size; an option without its dashes.
        value: Its value; None if it is not known.
        config: The config so far; its batch size scales a learning rate.
    """
    name = name.replace("-", "_").lower()
    if name in LEARNING_RATES:
        return _base_lr(value, config)
    if name in ("num_classes", "classes", "n_classes"):
        return "the number of classes follows from the data; leave it out"
    if key := SAME_VALUE.get(name):
        return f"write {key}={'...' if value is None else value}"
    return None


def suggest_section_key(section: str, value: Any) -> str | None:
    """Return what to write for a section that was given a single value, such as model=b0, or None."""
    keys = {"model": "model.variant", "data": "data.path", "optimizer": "optimizer.name", "train": "train.epochs"}
    return f"write {keys[section]}={value}" if section in keys else None


def _base_lr(value: Any, config: Mapping[str, Any]) -> str:
    train = config.get("train")
    batch_size = train.get("global_batch_size", 32) if isinstance(train, Mapping) else 32
    try:
        rate = f"{float(value) * REFERENCE_BATCH_SIZE / float(batch_size):.3g}"
    except (TypeError, ValueError):
        return (
            "write optimizer.base_lr=..., the learning rate at 256 images per step; it is scaled by global_batch_size"
        )
    return (
        f"write optimizer.base_lr={rate}, the learning rate at 256 images per step: that is {float(value):g} at "
        f"{batch_size} images"
    )
