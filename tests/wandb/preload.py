"""Imported by the fork server, so that no attempt spends a second on these imports again.

Loading a tokenizer once is what makes transformers import the rest of itself.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import wandb.agents.pyagent
import wandb.apis.public  # noqa: F401

from job.data.tokens import load_tokenizer
from tests.tiny_tokenizer import byte_level_tokenizer

os.environ["TOKENIZERS_PARALLELISM"] = "false"
with tempfile.TemporaryDirectory() as folder:
    byte_level_tokenizer().save_pretrained(folder)
    (Path(folder) / "config.json").write_text('{"model_type": "llama"}')
    load_tokenizer(folder)
