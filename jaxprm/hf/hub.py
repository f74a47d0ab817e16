"""Models by the name they have on the Hugging Face hub. Nothing is looked up but a name that a user gives."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from pathlib import Path

from jaxprm.errors import UserError

_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII)
# What a model of ours is made of; no code, no pickles, no weights in other formats.
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
_SUBFOLDERS = "*/*"


def resolve(path_or_id: str | Path, *, what: str = "model", files: Sequence[str] = _FILES) -> Path:
    """The directory of a model: a local one as it is, "org/name" or "org/name@revision" from the hub or its cache.

    files: which of them are fetched, by name or pattern. They are kept in the hub's cache (HF_HOME). With
    HF_HUB_OFFLINE=1, or without a network, only what is there is found.

    Raises UserError, one line that begins with `what`, where there is neither.
    """
    path = Path(path_or_id)
    if path.is_dir():
        return path
    named = _NAME.fullmatch(str(path_or_id))
    if path.exists() or not named:
        raise UserError(f"{what} {path}: no such directory; give one, or a name on the hub such as org/name")
    return _download(named["name"], named["revision"], what, files)


def name_of(directory: str | Path) -> str:
    """What to call a model in a record: "org/name" where it came from the hub, else its path."""
    parts = Path(directory).parts
    if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/", 1)
    return str(directory)


def _download(name: str, revision: str | None, what: str, files: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    shown = name if revision is None else f"{name}@{revision}"
    try:
        found = huggingface_hub.snapshot_download(
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
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        reason = f"{why}, and the model is not in the hub's cache ({huggingface_hub.constants.HF_HUB_CACHE})"
    except Exception as error:  # of huggingface_hub, of its HTTP client, of the disk
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = f"the hub cannot be reached ({said[:200]})"
    else:
        return Path(found)
    raise UserError(f"{what} {shown}: no such directory, and {reason}") from None
