"""EfficientNet training and fine-tuning: YAML in, a trained, tracked and honestly evaluated model out."""
