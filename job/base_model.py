"""`JOB_BASE_MODEL` resolved once: which files, at exactly which commit."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.errors import CredentialsError, OutageError, SettingsError

# Activations of these families overflow fp16 (their cards ask for bf16, which a T4 has not).
FP16_UNSAFE_MODEL_TYPES = ("gemma", "gemma2", "gemma3", "gemma3_text", "t5", "mt5", "umt5")


@dataclass(frozen=True)
class BaseModel:
    """A base model that exists."""

    name: str  # as the user gave it
    location: str  # what from_pretrained() takes: a folder or a Hugging Face id
    revision: str  # full commit on the hub; "sha256:…" over a folder's files
    config: dict[str, Any]  # config.json

    @property
    def hub_revision(self) -> str | None:
        """The commit for from_pretrained(); None for a folder."""
        return None if self.revision.startswith("sha256:") else self.revision


def resolve_base_model(name: str, revision: str) -> BaseModel:
    """Find the model and its exact version; downloads nothing but config.json.

    Raises `SettingsError` if it is no model that this job can train, `CredentialsError` if the hub
    wants a token, `OutageError` if the hub cannot be reached.
    """
    folder = Path(name.removeprefix("file://"))
    if folder.exists() or name.startswith(("/", ".", "file://")):
        model = _resolve_folder(name, folder)
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        model = _resolve_hub(name, revision)
    else:
        raise SettingsError(
            f"JOB_BASE_MODEL: {name} is neither a folder nor a Hugging Face id (owner/name)"
        )
    model_type = model.config.get("model_type")
    if model_type in FP16_UNSAFE_MODEL_TYPES:
        raise SettingsError(
            f"JOB_BASE_MODEL: {name} is of family {model_type}, which overflows in fp16, and a T4"
            " has no bf16; take a Mistral, Llama, Qwen or Phi model"
        )
    return model


def _resolve_folder(name: str, folder: Path) -> BaseModel:
    config = _read_config(name, folder / "config.json")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise SettingsError(
            f"JOB_BASE_MODEL: {folder} holds no *.safetensors file; pickled weights are refused,"
            " convert them with save_pretrained()"
        )
    digest = hashlib.sha256()
    # The tokenizer's files are part of the prepared data's digest.
    for path in (folder / "config.json", *weights):
        with path.open("rb") as file:
            digest.update(
                f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode()
            )
    return BaseModel(name, str(folder), f"sha256:{digest.hexdigest()}", config)


def _resolve_hub(name: str, revision: str) -> BaseModel:
    from huggingface_hub import HfApi, hf_hub_download  # 0.4 s to import, and not for folders
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        commit = HfApi().model_info(name, revision=revision, timeout=30).sha
        assert commit is not None
        config = _read_config(name, Path(hf_hub_download(name, "config.json", revision=commit)))
    except GatedRepoError as error:
        raise CredentialsError(
            f"JOB_BASE_MODEL: {name} is gated: accept its licence and set HF_TOKEN"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise SettingsError(
            f"JOB_BASE_MODEL: {name} at JOB_BASE_MODEL_REVISION={revision} is not on the Hugging"
            " Face hub and is no folder here; check the spelling, or set HF_TOKEN if it is private"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise OutageError(
            f"JOB_BASE_MODEL: {name}: the Hugging Face hub cannot be reached"
            f" ({type(error).__name__}); try again, or give a folder"
        ) from error
    return BaseModel(name, name, commit, config)


def _read_config(name: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"JOB_BASE_MODEL: {name} is not a model folder: {path} is missing or not JSON"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise SettingsError(f"JOB_BASE_MODEL: {name}: {path} names no model_type")
    return config
