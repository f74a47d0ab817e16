"""JSON as Python and other languages write it: with NaN, infinities and lone surrogates.

These are not JSON, but `json.dumps` writes them. Numbers that are not finite stay as floats, so that a field that needs
a number can name them; msgspec writes them as null. Lone surrogates have no UTF-8 and are replaced.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

import msgspec

from data_pipeline.errors import DataError

SURROGATES = "texts with half a surrogate pair, replaced by U+FFFD"
NOT_FINITE = "numbers that are NaN or infinite, null where a field goes to meta"
_SURROGATE = re.compile("[\ud800-\udfff]")


def decode(text: bytes | str, repairs: Counter[str] | None = None) -> Any:
    """The value of JSON. `repairs` counts what is not JSON.

    Raises DataError with the reason, without a place.
    """
    try:
        return msgspec.json.decode(text)
    except RecursionError:
        raise DataError("nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeError) as error:
        reason = str(error)
    # The reader of the standard library takes them, at a quarter of the speed.
    try:
        value = json.loads(text)
        counts: Counter[str] = Counter()
        value = _repaired(value, counts)
    except RecursionError:
        raise DataError("nested too deeply") from None
    except ValueError:
        raise DataError(f"not JSON: {reason}") from None
    # Whatever else the two readers disagree on is no JSON.
    if not counts:
        raise DataError(f"not JSON: {reason}")
    if repairs is not None:
        repairs += counts
    return value


def _repaired(value: Any, counts: Counter[str]) -> Any:
    if isinstance(value, str):
        repaired, count = _SURROGATE.subn("\ufffd", value)
        if count:
            counts[SURROGATES] += 1
        return repaired
    if isinstance(value, float) and not math.isfinite(value):
        counts[NOT_FINITE] += 1
    if isinstance(value, dict):
        return {_repaired(key, counts): _repaired(inner, counts) for key, inner in value.items()}
    return [_repaired(inner, counts) for inner in value] if isinstance(value, list) else value
