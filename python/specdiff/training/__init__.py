"""Training of drafters: docs/training.md tells how, `specdiff train` does it.

`config` reads a run's file, `run` carries it out. A task, `distillation` or `denoising`, says what
the loss of some texts is; `trainer` makes it small. `corpora` and `sample_target` get the texts.
"""
