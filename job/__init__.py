"""One container run = one trial of a QLoRA hyper-parameter sweep on one T4."""

__version__ = "0.1.0"
