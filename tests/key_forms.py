"""The forms in which servers repeat a key."""

import base64
import json
import urllib.parse


def forms(key: str) -> dict[str, str]:
    """The key as servers repeat it."""
    percent = "".join(f"%{ord(character):02X}" for character in key)
    encoded = base64.b64encode
    return {
        "plain": key,
        "lower": key.lower(),
        "upper": key.upper(),
        "beginning": key[:12] + "...",
        "end": "..." + key[-12:],
        "middle": key[5:17],
        "json": "".join(f"\\u{ord(character):04x}" for character in key),
        "json of json": json.dumps(json.dumps("".join(f"\\u{ord(character):04X}" for character in key))),
        "some json": key[:5] + f"\\u{ord(key[5]):04x}" + key[6:],
        "bytes": "".join(f"\\x{ord(character):02x}" for character in key),
        "percent": percent,
        "percent, lower": percent.lower(),
        "percent twice": urllib.parse.quote(percent),
        "some percent": key[:4] + f"%{ord(key[4]):02x}" + key[5:],
        "html": "".join(f"&#{ord(character)};" for character in key),
        "html, hex": "".join(f"&#x{ord(character):x};" for character in key),
        "hex": key.encode().hex(),
        "base64": encoded(key.encode()).decode(),
        "base64 after one": encoded(b":" + key.encode()).decode(),
        "base64 after two": encoded(b"me" + key.encode() + b"!").decode(),
        "base64 of a header": encoded(f"Bearer {key}".encode()).decode(),
        "base64, for URLs": base64.urlsafe_b64encode(key.encode()).decode().rstrip("="),
        "base64 in JSON": json.dumps(encoded(key.encode()).decode()).replace("/", "\\/"),
    }
