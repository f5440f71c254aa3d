"""A follower of test_crew.py: `python -m tests.training.crew_follower MEETING [TOKENS]`.

With TOKENS, a row of more tokens than that runs out of memory on this rank.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from job.ledger.records import Recipe
from job.training.crew import KINDS, join, read_task, ready_file
from job.training.follower import follow, serve
from job.training.messages import receive_table
from job.training.model import add_adapters, load_base
from job.training.trainer import Trainer

CPU = torch.device("cpu")


def main(meeting: Path, most_tokens: int | None) -> None:
    if most_tokens is None:
        follow(meeting, rank=1, size=2, device=CPU)
        return
    task = read_task(meeting)
    recipe = Recipe.model_validate(task["recipe"])
    model = add_adapters(load_base(task["location"], task["revision"], CPU), recipe)

    def refuse(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] > most_tokens:
            raise torch.OutOfMemoryError("as small as a test wants it")

    model.get_base_model().base_model.register_forward_pre_hook(refuse, with_kwargs=True)
    (meeting / ready_file(1)).touch()
    join(meeting, rank=1, size=2, device=CPU)
    tables = {kind: receive_table() for kind in KINDS}
    serve(Trainer(model, recipe, device=CPU, token_budget=1), tables, rank=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
