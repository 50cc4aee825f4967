"""From image files to batches: sources, validation, manifest, splits, augmentation, the input pipeline."""
