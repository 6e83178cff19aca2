"""Training of drafters, as run by `specdiff train`. docs/training.md is the guide.

`config` reads a run's file and `run` executes it. A task (`distillation` or `denoising`) defines
the loss, and `trainer` minimises it. `corpora` and `sample_target` supply the texts.
"""
