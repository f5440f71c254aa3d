"""A base model's weight files read tensor by tensor, so that no model has to fit into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from job.errors import SettingsError
from job.hub import explained

_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
_PACKED = ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"


def local_folder(location: str, revision: str | None, *, fetched: bool = False) -> Path:
    """The folder with the model's files: itself, or the hub's cache after a download.

    With `fetched` nothing is downloaded: the model was loaded before. Raises what `explained` makes
    of the hub's errors.
    """
    if revision is None:
        return Path(location)
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            location, revision=revision, allow_patterns=list(_FILES), local_files_only=fetched
        )
        return Path(folder)
    except Exception as error:  # the client's HTTP library has errors of its own
        if told := explained(error, "JOB_BASE_MODEL", location, revision):
            raise told from error
        raise


def skeleton(config: Any) -> Any:
    """The causal language model of `config` without memory: every tensor on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()


def is_transposed(module: Any) -> bool:
    """Whether the layer keeps its matrix as (inputs, outputs), as GPT-2's do."""
    return isinstance(module, Conv1D)


class Weights:
    """The tensors of a folder's safetensors files, under the names that the model has for them.

    A family whose files name them otherwise is loaded whole, by transformers, into memory.
    """

    def __init__(self, folder: Path, config: Any) -> None:
        self.config = config
        model = skeleton(config)
        wanted = {name for name, _ in model.named_parameters()}
        names, prefix = set(model.state_dict()), model.base_model_prefix
        self._files: dict[str, tuple[Path, str]] = {}
        self._parts: dict[str, dict[str, tuple[Path, str]]] = {}  # of packed matrices
        self._whole: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            for stored in _keys(path):
                own = stored if stored in names else f"{prefix}.{stored}"
                if own in names:
                    self._files[own] = path, stored
                else:  # `<matrix>.weight.absmax`, and whatever a family's files hold in excess
                    matrix = stored.partition(".weight.")[0] + ".weight"
                    part = stored.removeprefix(f"{matrix}.")
                    self._parts.setdefault(matrix, {})[part] = path, stored
        if wanted - set(self._files):
            if hasattr(config, "quantization_config"):
                raise SettingsError(f"JOB_BASE_MODEL: {folder}: its files name no such matrices")
            whole = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float16, use_safetensors=True, trust_remote_code=False
            )
            self._whole = {name: p.detach() for name, p in whole.named_parameters()}

    def names(self) -> list[str]:
        """The names of the tensors, as the files order them."""
        return list(self._whole or self._files)

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        """Read a tensor; a 4-bit matrix is given back in fp32, as its layer computes with it."""
        if self._whole:
            return self._whole[name].to(device)
        path, stored = self._files[name]
        tensor = _tensor(path, stored, device)
        parts = self._parts.get(stored, {})
        if not any(f".{part}" in _PACKED for part in parts):
            return tensor
        stats = {f"{stored}.{part}": _tensor(*where, device) for part, where in parts.items()}
        packed = bnb.nn.Params4bit.from_prequantized(
            data=tensor, quantized_stats=stats, requires_grad=False, device=device
        )
        whole: torch.Tensor = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
        return whole.float()


def read_config(folder: Path) -> Any:
    """The folder's config as transformers reads it. Raises `SettingsError`."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise SettingsError(f"JOB_BASE_MODEL: {folder} has no config that can be read") from error


def _keys(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())


def _tensor(path: Path, name: str, device: torch.device) -> torch.Tensor:
    with _opened(path) as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor.to(device)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise SettingsError(f"JOB_BASE_MODEL: {path} cannot be read: {error}") from error


def quantised_and_back(matrix: torch.Tensor) -> torch.Tensor:
    """Round a matrix to NF4 with double quantisation, as `load_base` does; same shape and dtype."""
    packed, state = bnb.functional.quantize_4bit(
        matrix, quant_type="nf4", compress_statistics=True, blocksize=64
    )
    whole: torch.Tensor = bnb.functional.dequantize_4bit(packed, state)
    return whole
