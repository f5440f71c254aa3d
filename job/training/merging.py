"""Merging a LoRA adapter into its base: one fp16 model that needs neither PEFT nor bitsandbytes.

The weights pass through tensor by tensor, so a base of any size can be merged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from job.errors import SettingsError, work_dir_error
from job.log import log
from job.progress import CountProgress, size
from job.training.model import write_tensors
from job.training.precision import compute_dtype
from job.training.weights import (
    Weights,
    is_transposed,
    local_folder,
    quantised_and_back,
    read_config,
    skeleton,
)

Onto = Literal["16bit", "4bit"]
MAX_SHARD_BYTES = 4_000_000_000  # of a weight file
_INDEX = "model.safetensors.index.json"


def merge_adapter(
    location: str,
    revision: str | None,
    adapter: Path,
    folder: Path,
    *,
    onto: Onto,
    device: torch.device,
) -> None:
    """Write base + adapter to `folder` as fp16 safetensors, with the config.

    `onto="16bit"` adds the adapter to the base's own weights, `"4bit"` to those that it was trained
    on: quantised to NF4 and back. A base that is in 4 bits already has no others. Matrices are
    computed on `device`, one at a time. Raises `SettingsError` for a base whose weights the adapter
    does not fit, `OutageError` if a volume is full.
    """
    source = local_folder(location, revision)
    config = read_config(source)
    weights = Weights(source, config)
    updates = _Updates(adapter, skeleton(config), device)
    if missing := updates.names - set(weights.names()):
        raise SettingsError(
            f"best --merge: {location} has no tensor {min(missing)}, to which the adapter belongs:"
            " this family's files name their weights otherwise; use base and adapter with PEFT"
        )
    try:
        with CountProgress("merging", "rows", total=len(weights.names())) as progress:
            _write_shards(_merged(weights, updates, onto, device, progress), folder)
        _write_config(config, folder)
    except OSError as error:
        raise work_dir_error(folder, error) from error
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    log.info("merged in %s: %s of fp16 weights", onto, size(num_bytes))


class _Updates:
    """What the adapter adds to each matrix of the base."""

    def __init__(self, adapter: Path, model: Any, device: torch.device) -> None:
        config = json.loads((adapter / "adapter_config.json").read_text())
        self._scaling = config["lora_alpha"] / config["r"]
        self._tensors = load_file(adapter / "adapter_model.safetensors")
        self._model, self._device = model, device
        ends = (".lora_A.weight", ".lora_B.weight")
        modules = {name.removesuffix(end) for name in self._tensors for end in ends}
        # `base_model.model.` is PEFT's own.
        self._keys = {
            f"{module.removeprefix('base_model.model.')}.weight": module
            for module in modules
            if not module.endswith(".weight")
        }
        self.names = set(self._keys)

    def apply(self, name: str, matrix: torch.Tensor, onto: Onto) -> torch.Tensor:
        """The matrix with the update: `matrix`'s own shape, fp32."""
        key = self._keys[name]
        down, up = (
            self._tensors[f"{key}.lora_{part}.weight"].to(self._device, torch.float32)
            for part in "AB"
        )
        turned = is_transposed(self._model.get_submodule(name.removesuffix(".weight")))
        base = matrix.t().contiguous() if turned else matrix
        if onto == "4bit":
            base = quantised_and_back(base.to(compute_dtype(self._device)))
        whole: torch.Tensor = base.float() + self._scaling * (up @ down)
        return whole.t() if turned else whole


def _merged(
    weights: Weights, updates: _Updates, onto: Onto, device: torch.device, progress: CountProgress
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the merged model, in fp16 on the CPU. Raises `SettingsError` at overflow."""
    packed = getattr(weights.config, "quantization_config", None) is not None
    for name in weights.names():
        tensor = weights.read(name, device)
        if name in updates.names:
            tensor = updates.apply(name, tensor, "16bit" if packed else onto)
        if tensor.is_floating_point():
            tensor = tensor.to(torch.float16)
            if not bool(tensor.isfinite().all()):
                raise SettingsError(
                    f"best --merge: {name} holds values that fp16 cannot (over 65504)"
                )
        progress.advance(1)
        yield name, tensor.cpu().contiguous()


def _write_shards(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Write the tensors to files of at most `MAX_SHARD_BYTES`, named as transformers names them."""
    shard: dict[str, torch.Tensor] = {}
    shards: list[list[str]] = []
    total = num_bytes = 0

    def flush() -> None:
        nonlocal shard, num_bytes
        write_tensors(folder / f"part-{len(shards)}", shard)
        shards.append(list(shard))
        shard, num_bytes = {}, 0

    for name, tensor in tensors:
        if shard and num_bytes + tensor.nbytes > MAX_SHARD_BYTES:
            flush()
        shard[name] = tensor
        num_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_config(config: Any, folder: Path) -> None:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float16
    config.save_pretrained(folder)
    origin = Path(config.name_or_path) / "generation_config.json"
    if origin.is_file():
        (folder / origin.name).write_bytes(origin.read_bytes())
