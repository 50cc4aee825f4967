"""EfficientNet training and fine-tuning: YAML in, a trained, tracked and honestly evaluated model out."""

import os

ORIGINAL_ENVIRONMENT = dict(os.environ)  # for processes that must not see the change below, such as the Keras baseline

# TensorFlow reads this variable when it is imported. By default it uses oneDNN's kernels on some processors only. On
# processors without AVX-512, B0 with fused batch normalization trains 1.3 times as fast with them (two cores of an AMD
# EPYC, 224 pixels, 16 images). The kernels round differently, so every process that computes with this package has to
# agree: commands, notebooks, tests, spawned processes and programs that import one module. They have only the import of
# `pipeline` in common, which always precedes its modules' import of TensorFlow; a call in `run_cli` would miss the
# rest.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
