"""Whether a model that is trained from a base can be exported, checked before it is trained."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from data_pipeline.encode import Encoder
from jaxprm.errors import UserError
from jaxprm.export.tokenizer import write_tokenizer
from jaxprm.scoring.check import sample_conversations


def check_exportable(base: Path, encoder: Encoder) -> None:
    """Raises UserError or DataError, as `export` would, if a model trained from `base` could not be exported.

    Args:
        base: a directory with tokenizer.json, and config.json if it is a model.
        encoder: that of training: the tokenizer of `base`, with any chat template.
    """
    check_padding(base, encoder)
    with tempfile.TemporaryDirectory(prefix="jaxprm-export-") as scratch:
        trained, exported = Path(scratch) / "trained", Path(scratch) / "exported"
        # As training and export write them, one after the other.
        for directory in (trained, exported):
            directory.mkdir()
            if (base / "config.json").is_file():  # AutoTokenizer reads the family from it
                shutil.copyfile(base / "config.json", directory / "config.json")
        encoder.write_tokenizer(base, trained)
        write_tokenizer(trained, exported, Encoder.load(trained), sample_conversations(), source_name=str(base))


def check_padding(model: Path, encoder: Encoder) -> None:
    """Raises UserError if a step can end with the padding token: consumers read the last token that is not padding."""
    example = encoder.trajectory(sample_conversations()[0], row="example")
    last = int(example.tokens[example.read_positions[-1]])
    if encoder.pad_id in (encoder.end_id, last):
        raise UserError(
            f"model {model}: pad_token is {encoder.decode([encoder.pad_id])!r}, which also ends a message, so "
            "consumers of an export would read the wrong token, and all other special tokens are used by the "
            "tokenizer or the chat template; add a special token to tokenizer.json, with an id that the model has a "
            "row for, and name it as pad_token in tokenizer_config.json"
        )
