"""Models on the Hugging Face hub, by the id that a user gives."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from pathlib import Path

from jaxprm.errors import UserError
from jaxprm.redaction import redact

_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII)
# The only files that are downloaded: no code, no pickles, no weights in other formats.
_FILES = (
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "reward_model.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# The hub's patterns are those of fnmatch, where * crosses slashes: *.safetensors matches in subfolders too.
_SUBFOLDERS = "*/*"


def resolve(path_or_id: str | Path, *, what: str = "model", files: Sequence[str] = _FILES) -> Path:
    """The directory of a model: a local directory, or the snapshot of "org/name" or "org/name@revision" from the hub.

    Downloads go to the hub's cache (HF_HOME). With HF_HUB_OFFLINE=1, or without a network, only the cache is used.

    Args:
        what: what the model is for, the first word of errors.
        files: names or patterns of the files to download.

    Raises UserError if there is neither a directory nor a model of that name.
    """
    path = Path(path_or_id)
    if path.is_dir():
        return path
    match = _NAME.fullmatch(str(path_or_id))
    if path.exists() or not match:
        raise UserError(f"{what} {path}: no such directory; give one, or a name on the hub such as org/name")
    return _download(match["name"], match["revision"], what, files)


def name_of(directory: str | Path) -> str:
    """The name of a model directory for records: "org/name" if it is in the hub's cache, else its path."""
    parts = Path(directory).parts
    if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/", 1)
    return str(directory)


def _download(name: str, revision: str | None, what: str, files: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors, get_token

    shown = name if revision is None else f"{name}@{revision}"
    try:
        snapshot = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(files), ignore_patterns=[_SUBFOLDERS]
        )
    except errors.GatedRepoError:
        reason = "its licence must be accepted on the hub; then set HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = f"the hub has {name}, but no revision {revision}"
    except errors.RepositoryNotFoundError:
        reason = "the hub has no such model, or it is private and HF_TOKEN is not set"
    except errors.LocalEntryNotFoundError:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        cause = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        reason = f"{cause}, and the model is not in the hub's cache ({huggingface_hub.constants.HF_HUB_CACHE})"
    # No common base class: errors come from huggingface_hub, its HTTP client and the disk.
    except Exception as error:
        # A full disk is no failure of the hub.
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = redact(message, get_token())
        reason = f"the hub cannot be reached ({message[:200]})"
    else:
        return Path(snapshot)
    raise UserError(f"{what} {shown}: no such directory, and {reason}") from None
