"""Pre-trains the demo's base model: a 2 M parameter Llama that knows a little of Python's prose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.demo.tokenizer import train_tokenizer

if TYPE_CHECKING:
    import torch

OnStep = Callable[[int, int, float], None]  # optimizer step, planned steps, train loss


@dataclass(frozen=True)
class PretrainingPlan:
    """Everything that decides the weights, but for the text and the torch version."""

    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 6
    num_key_value_heads: int = 2
    max_length: int = 2048  # tokens, twice the default of JOB_MAX_SEQ_LENGTH
    num_steps: int = 750
    batch_size: int = 8
    sequence_length: int = 64  # tokens
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    held_out_pieces: int = 200
    seed: int = 17


@dataclass(frozen=True)
class Losses:
    """Mean negative log-likelihood per token, natural log, of pieces that are never trained on."""

    held_out_before: float
    held_out_after: float


def pretrain(
    text: Sequence[str],
    model_dir: Path,
    plan: PretrainingPlan,
    *,
    on_progress: OnStep | None = None,
) -> Losses:
    """Train tokenizer and model on `text` and save both, in fp32, as a Hugging Face folder.

    The same text, plan and torch version give the same weights.
    """
    import torch
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(plan.seed)
        order = torch.randperm(len(text)).tolist()
        held_out = [text[i] for i in order[: plan.held_out_pieces]]
        learned = [text[i] for i in order[plan.held_out_pieces :]]
        tokenizer = train_tokenizer(learned, vocab_size=plan.vocab_size, max_length=plan.max_length)
        model = LlamaForCausalLM(_config(plan, tokenizer))
        held_out_rows = _rows_of_tokens(held_out, tokenizer, plan.sequence_length)
        before = _held_out_loss(model, held_out_rows)
        _train(model, _rows_of_tokens(learned, tokenizer, plan.sequence_length), plan, on_progress)
        after = _held_out_loss(model, held_out_rows)
    with no_progress_bars():
        model.save_pretrained(model_dir)
        tokenizer.save_pretrained(model_dir)
    return Losses(held_out_before=before, held_out_after=after)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread: a step then takes 0.11 s on every machine, and gives the same weights.

    Two threads took 0.07 s on two idle cores, but 0.38 s when something else wanted one of them.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar for one small file across the caller's output."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _config(plan: PretrainingPlan, tokenizer: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=plan.vocab_size,
        hidden_size=plan.hidden_size,
        intermediate_size=plan.intermediate_size,
        num_hidden_layers=plan.num_layers,
        num_attention_heads=plan.num_heads,
        num_key_value_heads=plan.num_key_value_heads,
        max_position_embeddings=plan.max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def _rows_of_tokens(pieces: Sequence[str], tokenizer: Any, length: int) -> torch.Tensor:
    """The pieces one after another, each between BOS and EOS, cut into (rows, length) int64."""
    import torch

    tokens: list[int] = []
    for ids in tokenizer(list(pieces), add_special_tokens=False)["input_ids"]:
        tokens += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    num_rows = len(tokens) // length
    return torch.tensor(tokens[: num_rows * length], dtype=torch.int64).view(num_rows, length)


def _train(
    model: Any, rows: torch.Tensor, plan: PretrainingPlan, on_progress: OnStep | None
) -> None:
    """Shuffled passes over `rows`; AdamW, short warm-up, then linear decay to zero."""
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=plan.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.01,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / plan.warmup_steps, (plan.num_steps - step) / plan.num_steps),
    )
    batches = _batches(rows, plan)
    model.train()
    for step in range(1, plan.num_steps + 1):
        batch = next(batches)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if on_progress is not None:
            on_progress(step, plan.num_steps, loss.item())


def _batches(rows: torch.Tensor, plan: PretrainingPlan) -> Iterator[torch.Tensor]:
    """Endless batches of `batch_size` rows, in a new order at every pass."""
    import torch

    while True:
        yield from torch.split(rows[torch.randperm(len(rows))], plan.batch_size)


def _held_out_loss(model: Any, rows: torch.Tensor) -> float:
    import torch

    model.eval()
    with torch.inference_mode():
        losses = [  # rows are of one length, so each weighs the same
            float(model(input_ids=batch, labels=batch, use_cache=False).loss) * len(batch)
            for batch in torch.split(rows, 64)
        ]
    return sum(losses) / len(rows)
