"""Resolves `JOB_BASE_MODEL` once: which files, at exactly which commit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from job.errors import SettingsError, work_dir_error
from job.file_uri import path_of
from job.hub import FULL_COMMIT, cached_commit, explained, is_offline, waited_out
from job.log import log
from job.process.workspace import filling
from job.progress import CountProgress, size
from job.store.base import file_sha256
from job.store.objects import ObjectInfo, download_object, list_objects

# Families whose activations overflow fp16 (largest value 65504); a T4 has no bf16 to fall back to.
# Sources: vLLM's models without float16 (vllm/config/model.py, _FLOAT16_NOT_SUPPORTED_MODELS),
# Unsloth's models forced to float32 (loader.py, FORCE_FLOAT32; unsloth-zoo pull 600 for Gemma 4),
# transformers issues 36822 (Gemma 3), 4586 and 9295 (T5). For the first Gemma we found no report.
_VLLM, _UNSLOTH = "vLLM refuses it in float16", "Unsloth trains it in float32 only"
FP16_UNSAFE_MODEL_TYPES = {
    "gemma": "its card asks for bf16",
    "gemma2": _VLLM,
    "gemma3": f"{_VLLM}, {_UNSLOTH}; transformers issue 36822",
    "gemma3_text": f"{_VLLM}, {_UNSLOTH}; transformers issue 36822",
    "gemma3n": _UNSLOTH,
    "gemma3n_text": _UNSLOTH,
    "gemma4": f"{_UNSLOTH}: its down_proj overflows",
    "gemma4_text": f"{_UNSLOTH}: its down_proj overflows",
    "gemma4_unified": f"Gemma 4: {_UNSLOTH}, its down_proj overflows",
    "gemma4_unified_text": f"Gemma 4: {_UNSLOTH}, its down_proj overflows",
    "glm4": _VLLM,
    "glm4_moe": _UNSLOTH,
    "glm4_moe_lite": _UNSLOTH,
    "gpt_oss": _UNSLOTH,
    "plamo2": _VLLM,
    "qwen3_5": _UNSLOTH,
    "qwen3_5_text": _UNSLOTH,
    "qwen3_moe": _UNSLOTH,
    "t5": "transformers issues 4586, 9295",
    "mt5": "transformers issues 4586, 9295",
    "umt5": "transformers issues 4586, 9295",
}
# The files of a folder that from_pretrained() reads: no pickles, no code, nothing in sub-folders.
MODEL_FILE = re.compile(r"[\w.-]+\.(safetensors|json|model|txt|jinja)", re.ASCII)
ADAPTER_FILE = "adapter_config.json"
Check = Callable[[str, Mapping[str, Any]], object]  # of a model's name and config.json
CheckDigest = Callable[[str], object]  # of the revision of a folder or of a bucket's files


@dataclass(frozen=True)
class BaseModel:
    """A base model that was found, and what its config.json says."""

    name: str  # as the user gave it
    location: str  # what from_pretrained() takes: a folder or a Hugging Face id
    revision: str  # full commit on the hub; "sha256:…" over a folder's files or a bucket's listing
    config: dict[str, Any]  # config.json

    @property
    def hub_revision(self) -> str | None:
        """The commit for from_pretrained(); None for a folder, a staged one too."""
        is_commit = not self.revision.startswith("sha256:")
        return self.revision if is_commit and self.location == self.name else None


def is_hub_name(name: str) -> bool:
    """Whether `JOB_BASE_MODEL` means a model of the hub: it is no folder here, and no bucket's."""
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith(".")
    return bool(is_id) and not Path(name).exists()


def resolve_base_model(
    name: str,
    revision: str,
    cache_dir: Path | None = None,
    *,
    outage_seconds: float = 1200,
    should_stop: Callable[[], None] = lambda: None,
    check: Check = lambda _name, _config: None,
    check_digest: CheckDigest = lambda _revision: None,
) -> BaseModel:
    """Find the model and its exact version.

    From the hub only config.json is downloaded; a bucket's files all come to `cache_dir`, which
    later trials on this disk find there. `check` is given the config before any weight is fetched
    or read, `check_digest` the revision of a folder or a bucket's files before any is fetched.
    Raises `SettingsError` if it is no model that this job can train, `CredentialsError` if the hub
    wants a token or the bucket refuses us, `OutageError` if either cannot be reached, and what the
    checks raise.
    """
    try:
        named = path_of(name)
    except ValueError as error:
        raise SettingsError(f"JOB_BASE_MODEL: {name} {error}") from error
    folder = named or Path(name)
    if named or folder.exists() or name.startswith(("/", ".")):
        model = _resolve_folder(name, folder, check, KnownDigests(cache_dir))
        check_digest(model.revision)
    elif re.match("(s3|gs|az)://", name, re.IGNORECASE):
        assert cache_dir is not None, "a bucket's model needs a place on this disk"
        model = _resolve_bucket(
            name, cache_dir, outage_seconds, should_stop, check=check, check_digest=check_digest
        )
    elif is_hub_name(name):
        model = waited_out(lambda: _resolve_hub(name, revision, check), outage_seconds, should_stop)
    else:
        raise SettingsError(
            f"JOB_BASE_MODEL: {name} is neither a folder, a bucket URI (s3://, gs://, az://) nor a"
            " Hugging Face id (owner/name)"
        )
    _tell_unread_revision(model, revision)
    return model


def _tell_unread_revision(model: BaseModel, revision: str) -> None:
    """Warn that a revision is not read; one that a sweep recorded (sha256:…) nobody has set."""
    if model.hub_revision is None and revision != "main" and not revision.startswith("sha256:"):
        log.warning(
            "JOB_BASE_MODEL_REVISION=%s says nothing of %s, which is no model of the hub: its files"
            " are taken as they are and known by their sha256",
            *(revision, model.name),
        )


class KnownDigests:
    """The sha256 of files that were read in full once, kept in the work folder.

    A digest holds while the file's size, its times of change and its place on the volume are what
    they were. Reading takes 1.5 s a GB (one core, 2026-11-26), at the start of every trial.
    """

    def __init__(self, work_dir: Path | None) -> None:
        self._path = work_dir / "digests.json" if work_dir else None
        self._known: dict[str, list[Any]] = {}
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(self._path.read_bytes()) if self._path else {}
            self._known = content if isinstance(content, dict) else {}

    def sha256(self, path: Path) -> str:
        """The digest of the file, read only if it is not known. Raises `OSError`."""
        status, name = path.stat(), str(path.absolute())
        # The time of a change of the inode cannot be set back, as that of the content can.
        mark = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        known = self._known.get(name)
        if isinstance(known, list) and known[:-1] == mark:
            return str(known[-1])
        digest = file_sha256(path)
        self._known[name] = [*mark, digest]
        return digest

    def keep(self) -> None:
        """Write what is known; a work folder that cannot be written costs the next trial time."""
        if self._path is None:
            return
        draft = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(self._known))
            draft.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink()


def _resolve_folder(name: str, folder: Path, check: Check, digests: KnownDigests) -> BaseModel:
    if (folder / ADAPTER_FILE).exists():
        raise _adapter_as_base(str(folder), folder / ADAPTER_FILE)
    config = read_config(name, folder / "config.json")
    check(name, config)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise no_weights(str(folder), (path.name for path in folder.iterdir()))
    digest = hashlib.sha256()
    # The tokenizer's files are part of the prepared data's digest.
    for path in (folder / "config.json", *weights):
        try:
            if path in weights:
                check_weights(path)
            sha256 = digests.sha256(path)
        except OSError as error:
            raise SettingsError(
                f"JOB_BASE_MODEL: {path} cannot be read: {error.strerror}"
            ) from error
        digest.update(f"{path.name} {sha256}\n".encode())
    digests.keep()
    return BaseModel(name, str(folder), f"sha256:{digest.hexdigest()}", config)


def _resolve_bucket(
    name: str,
    cache_dir: Path,
    outage_seconds: float,
    should_stop: Callable[[], None],
    *,
    check: Check,
    check_digest: CheckDigest,
) -> BaseModel:
    """Find a bucket's model. Its revision hashes the listing, so one on this disk moves no byte."""
    scheme, _, rest = name.rstrip("/").partition("://")
    bucket, _, key = rest.partition("/")
    prefix = f"{key}/" if key else ""
    uri = f"{scheme.lower()}://{bucket}/{prefix}"
    listed = list_objects(uri, setting="JOB_BASE_MODEL", outage_seconds=outage_seconds)
    everything = {info.key.removeprefix(prefix): info for info in listed}
    files = {file: info for file, info in everything.items() if MODEL_FILE.fullmatch(file)}
    if ADAPTER_FILE in files:
        raise _adapter_as_base(uri)
    if not any(file.endswith(".safetensors") for file in files):
        raise no_weights(uri, everything)
    if "config.json" not in files:
        raise SettingsError(f"JOB_BASE_MODEL: {uri} is not a model folder: it has no config.json")
    digest = hashlib.sha256()
    for file, info in sorted(files.items()):
        digest.update(f"{file} {info.size_bytes} {info.version}\n".encode())
    revision = f"sha256:{digest.hexdigest()}"
    check_digest(revision)
    folder = cache_dir / "models" / digest.hexdigest()
    download = partial(
        _download_model, uri, folder=folder, outage_seconds=outage_seconds, should_stop=should_stop
    )
    download({"config.json": files["config.json"]})
    config = read_config(uri, folder / "config.json")  # before gigabytes of weights
    check(name, config)
    download(files)
    for file in sorted(file for file in files if file.endswith(".safetensors")):
        try:
            check_weights(folder / file)
        except SettingsError as error:  # it is as long as in the bucket
            raise SettingsError(f"{error} and copy it to {uri} again") from error
    return BaseModel(name, str(folder), revision, config)


def _download_model(
    uri: str,
    files: Mapping[str, ObjectInfo],
    *,
    folder: Path,
    outage_seconds: float,
    should_stop: Callable[[], None],
) -> None:
    """Download the files that this disk does not hold in full, one worker on it for all."""

    def missing() -> dict[Path, ObjectInfo]:
        on_disk = {folder / file: info for file, info in files.items()}
        return {p: info for p, info in on_disk.items() if not _has_size(p, info.size_bytes)}

    if not missing():
        return
    try:
        with filling(folder, limit_seconds=outage_seconds, should_stop=should_stop):
            left = missing()
            num_bytes = sum(info.size_bytes for info in left.values())
            if left:
                log.info("base model: downloading %d files, %s", len(left), size(num_bytes))
            with CountProgress("base model: downloading", "bytes", total=num_bytes) as progress:
                for path, info in left.items():
                    should_stop()
                    download_object(
                        uri,
                        info,
                        path,
                        progress.advance,
                        setting="JOB_BASE_MODEL",
                        outage_seconds=outage_seconds,
                    )
    except OSError as error:
        raise work_dir_error(folder, error) from error


def _has_size(path: Path, size_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == size_bytes


def _resolve_hub(name: str, revision: str, check: Check) -> BaseModel:
    """Find a hub's model; what is in the cache at a commit in full needs no network.

    Offline (`HF_HUB_OFFLINE`) any revision is the one in the cache.
    """
    from huggingface_hub import HfApi, hf_hub_download  # 0.4 s to import, and not for folders
    from huggingface_hub.errors import EntryNotFoundError

    try:
        commit: str | None = revision
        if is_offline():
            commit = cached_commit(name, revision, kind="model") or revision
        elif not FULL_COMMIT.fullmatch(revision):
            commit = HfApi().model_info(name, revision=revision, timeout=30).sha
        assert commit is not None
        path = Path(hf_hub_download(name, "config.json", revision=commit))
    except Exception as error:  # the client's HTTP library has errors of its own
        if told := explained(error, "JOB_BASE_MODEL", name, revision):
            raise told from error
        if not isinstance(error, EntryNotFoundError):
            raise
        if adapter := _adapter_file(name, commit):
            raise _adapter_as_base(name, adapter) from error
        raise SettingsError(
            f"JOB_BASE_MODEL: {name} at revision {revision} is no model: it has no config.json"
        ) from error
    if adapter := _adapter_file(name, commit):
        raise _adapter_as_base(name, adapter)
    config = read_config(name, path)
    check(name, config)
    return BaseModel(name, name, commit, config)


def _adapter_file(name: str, commit: str | None) -> Path | None:
    """The adapter's config in a hub's model; None without one, or where the hub does not say.

    transformers loads what lies beside a base, too. The cache knows what a commit does not hold.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    known = try_to_load_from_cache(name, ADAPTER_FILE, revision=commit)
    if known is None:
        with contextlib.suppress(Exception):  # loading will tell what it means
            known = hf_hub_download(name, ADAPTER_FILE, revision=commit)
    return Path(known) if isinstance(known, str) else None


def read_config(name: str, path: Path) -> dict[str, Any]:
    """config.json of a base that this job can train. Raises `SettingsError`."""
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"JOB_BASE_MODEL: {name} is not a model folder: {path} is missing or not JSON"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise SettingsError(f"JOB_BASE_MODEL: {name}: {path} names no model_type")
    family = config["model_type"]
    if family in FP16_UNSAFE_MODEL_TYPES:
        raise SettingsError(
            f"JOB_BASE_MODEL: {name} is of family {family}, which overflows in fp16"
            f" ({FP16_UNSAFE_MODEL_TYPES[family]}), and a T4 has no bf16; take a Mistral, Llama,"
            " Qwen or Phi model"
        )
    if (method := other_quantisation(config)) is not None:
        raise SettingsError(
            f"JOB_BASE_MODEL: {name} is quantised already, by {method}, and adapters are trained on"
            " bitsandbytes' NF4: take the model that it was made of, or one in NF4 (-bnb-4bit)"
        )
    return config


def other_quantisation(config: Mapping[str, Any]) -> str | None:
    """Name the way in which a checkpoint is quantised; None if it is not, or is in NF4.

    https://huggingface.co/docs/transformers/main_classes/quantization
    """
    own = config.get("quantization_config") or config.get("compression_config")
    if not own:
        return None
    if not isinstance(own, Mapping):
        return "a way that its config.json does not tell"
    method = str(own.get("quant_method") or "bitsandbytes")
    if method not in ("bitsandbytes", "bitsandbytes_4bit"):
        return method
    if not (own.get("load_in_4bit") or own.get("_load_in_4bit")):
        return "bitsandbytes' int8"
    kind = own.get("bnb_4bit_quant_type", "fp4")  # the library's default
    return None if kind == "nf4" else f"bitsandbytes' {kind}"


def _adapter_as_base(where: str, path: Path | None = None) -> SettingsError:
    """Make the error for a place that holds an adapter; its file `path` may name the base."""
    base = None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        base = json.loads(path.read_bytes()).get("base_model_name_or_path") if path else None
    return SettingsError(
        f"JOB_BASE_MODEL: {where} is an adapter ({ADAPTER_FILE}), not a base model: give the model"
        f" that it belongs to{f', {base}' if base else ''}"
    )


_LENGTH_BYTES = 8  # of the header, little-endian, at the file's beginning
_HEADER_LIMIT_BYTES = 100_000_000  # safetensors' own
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_weights(path: Path) -> None:
    """Compare the file's size with what its header says. Raises `SettingsError`, `OSError`.

    Format: https://huggingface.co/docs/safetensors. Reads the header only, never a tensor.
    """
    have = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = file.read(length) if length <= min(have, _HEADER_LIMIT_BYTES) else b""
    try:
        tensors = json.loads(header)
        ends = [int(t["data_offsets"][1]) for n, t in tensors.items() if n != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _damaged(path, "is cut off or no safetensors file, its header is damaged") from error
    need = _LENGTH_BYTES + length + max(ends, default=0)
    if have < need:
        raise _damaged(path, f"is cut off, {have} of {need} bytes are there")
    if have > need:
        raise _damaged(path, f"is damaged, {have - need} bytes more than its header says")


def no_weights(where: str, files: Iterable[str]) -> SettingsError:
    """Make the error for a place whose files, none of them safetensors, are these."""
    what = f"JOB_BASE_MODEL: {where} holds no *.safetensors file"
    if any(file.endswith(_PICKLES) for file in files):
        return SettingsError(
            f"{what}; pickled weights are refused, convert them with save_pretrained()"
        )
    return SettingsError(f"{what} and no other weights; fetch the whole model")


def _damaged(path: Path, what: str) -> SettingsError:
    return SettingsError(f"JOB_BASE_MODEL: {path} {what}; fetch it again")
