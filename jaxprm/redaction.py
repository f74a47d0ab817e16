"""Secrets: found in configs before they are written anywhere, and struck out of what servers and libraries say."""

from __future__ import annotations

import base64
import binascii
import functools
import html
import itertools
import re
from collections.abc import Iterator
from typing import Any

# Shorter keys are no secrets ("EMPTY", "none"), and striking them out would damage texts.
MIN_SECRET = 8
REPLACEMENT = "[key]"

# Detectors of detect-secrets: forms of keys that are unmistakable. Left out are those that flag addresses, words after
# "key", and what only looks random, which configs are full of.
_DETECTORS = (
    ("aws", "AWSKeyDetector"),
    ("azure_storage_key", "AzureStorageKeyDetector"),
    ("discord", "DiscordBotTokenDetector"),
    ("github_token", "GitHubTokenDetector"),
    ("gitlab_token", "GitLabTokenDetector"),
    ("jwt", "JwtTokenDetector"),
    ("mailchimp", "MailchimpDetector"),
    ("npm", "NpmDetector"),
    ("openai", "OpenAIDetector"),
    ("private_key", "PrivateKeyDetector"),
    ("pypi_token", "PypiTokenDetector"),
    ("sendgrid", "SendGridDetector"),
    ("slack", "SlackDetector"),
    ("square_oauth", "SquareOAuthDetector"),
    ("stripe", "StripeDetector"),
    ("telegram_token", "TelegramBotTokenDetector"),
    ("twilio", "TwilioKeyDetector"),
)
# What detect-secrets lacks. 20 letters and digits in a row are too many for the name of a model or a file.
_VALUES = re.compile(
    r"(?:^|[^A-Za-z0-9])(?:sk|pk|rk|gsk|xai|nvapi|pplx|fw|r8|hf|gh[pousr]|github_pat|npm|tgp_v1|glpat)[-_]"
    r"(?:[A-Za-z0-9]+[-_])*[A-Za-z0-9]{20}"
    r"|(?:^|[^A-Za-z0-9])dapi[0-9a-f]{32}|xox[a-z]-[A-Za-z0-9-]{10,}|AIza[A-Za-z0-9_-]{30,}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}|(?i:\bbearer\s+\S{8,})|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|[A-Za-z][A-Za-z0-9+.-]*://[^/?#\s@]*@"
    # "?api_key=...", "password: ...", but neither "$KEY" nor "{key}", which stand for one.
    r"|(?i:(?:api[_-]?key|(?:access|auth|refresh)[_-]?token|secret[_-]?key|private[_-]?key|client[_-]?secret"
    r"|passw(?:or)?d)[\"']?\s*[=:]\s*[\"']?[^\s\"'&$<{]{6})"
    r"|(?i:[?&](?:key|token|sig|signature)=[^\s&$<{]{6})"
)
_BASIC = re.compile(r"(?i:\bbasic\s+)([A-Za-z0-9+/_-]{4,}={0,2})")
# Names of fields that hold nothing but secrets, and names that may also mean something else.
_SECRET_NAMES = re.compile(
    r"(?i)(?:^|[_.-])(?:api[_-]?keys?|authorization|pass(?:word|wd|phrase)s?|(?:client[_-]?)?secrets?|bearer|cookies?"
    r"|(?:secret|private)[_-]?(?:access[_-]?)?keys?|(?:access|api|auth|hf|hub|bearer|refresh|session|id)[_-]?tokens?)$"
)
_OPEN_NAMES = re.compile(r"(?i)^(?:keys?|tokens?|auth|credentials?)$")
# 32 letters and digits in a row: as long as the shortest random keys, and longer than the words of names.
_RUN = re.compile(r"[A-Za-z0-9]{32,}")
_WHOLE_RUN = re.compile(r"[A-Za-z0-9+/]{40}")
_HEX = re.compile(r"(?i)[0-9a-f]+")
_DIGEST_FIELDS = re.compile(r"(?i)(?:revision|commit|sha\d*|digest|hash|checksum|fingerprint|md5|etag|uuid|id)s?$")
# Before the digest of a file, an image or a version: "sha256:...", "org/model@...".
_DIGEST_MARK = re.compile(r"(?i)(?:@|\b(?:sha\d+|md5|rev|commit)[:=-])$")


def secret_field(plain: Any) -> str | None:
    """The first field of a plain config that holds something like a secret, or None.

    Values are checked in every field. Under `policy`, a field with a secret's name may hold nothing; elsewhere it may
    hold plain words, because an environment may have a password or a key in its game.
    """
    for field, name, value in _texts(plain, "", ""):
        under_policy = field.startswith("policy.")
        if value and (_is_secret(value, name) or _is_named_secret(value, name, under_policy)):
            return field
    return None


def redact(text: str, secret: str | None) -> str:
    """The text without the secret. Servers and libraries repeat keys in their errors, and servers in their answers.

    Also found are its parts of 8 characters and more, in upper or lower case, escaped as in JSON, URLs or HTML, in
    hexadecimal, and in base64 at any position of what was encoded. A secret of less than MIN_SECRET characters is
    replaced only where it stands unchanged.
    """
    if not secret:
        return text
    if len(secret) < MIN_SECRET:
        return text.replace(secret, REPLACEMENT)
    needles = _needles(secret)
    plain, starts = _unescaped(text)
    # One character for each of `plain`: the lower case of some letters is longer.
    folded = "".join(map(_fold, plain))
    pieces: list[str] = []
    end = 0
    for first, last in _runs(folded, needles):
        if _tells(folded[first:last], secret):
            pieces += [text[end : starts[first]], REPLACEMENT]
            end = starts[last]
    return "".join(pieces) + text[end:]


@functools.lru_cache(maxsize=4)
def _needles(secret: str) -> frozenset[str]:
    """All parts of MIN_SECRET characters of a secret's forms."""
    encoded = secret.encode()
    forms = [secret, encoded.hex()]
    for offset in range(3):
        # A character of base64 holds 6 bits: those at the ends also depend on what comes before and after.
        text = base64.b64encode(bytes(offset) + encoded + bytes(3)).decode()
        forms.append(text[-(-8 * offset // 6) : 8 * (offset + len(encoded)) // 6])
    folded = ["".join(map(_fold, form)) for form in forms]
    return frozenset(
        form[start : start + MIN_SECRET] for form in folded for start in range(max(0, len(form) - MIN_SECRET + 1))
    )


_ESCAPES = re.compile(
    # %41, also escaped again; \u0041; \x41; \/ and \" of JSON; &#65; &#x41; &amp;.
    r"%(?:25)*([0-9A-Fa-f]{2})|\\+u([0-9A-Fa-f]{4})|\\+x([0-9A-Fa-f]{2})|\\+([/\"'\\])"
    r"|(&(?:#\d{1,7}|#[xX][0-9A-Fa-f]{1,6}|\w{2,6});)"
)


def _unescaped(text: str) -> tuple[str, list[int]]:
    """The text with its escapes resolved, and where each of its characters begins in `text`; at last, its length."""
    characters: list[str] = []
    starts: list[int] = []
    position = 0
    for match in _ESCAPES.finditer(text):
        characters += text[position : match.start()]
        starts += range(position, match.start())
        percent, unicode, byte, literal, entity = match.groups()
        if code := percent or unicode or byte:
            characters.append(chr(int(code, 16)))
        else:
            characters.append(literal or html.unescape(entity)[:1] or "&")
        starts.append(match.start())
        position = match.end()
    characters += text[position:]
    starts += range(position, len(text) + 1)
    return "".join(characters), starts


def _fold(character: str) -> str:
    # The two alphabets of base64 differ in these.
    return {"-": "+", "_": "/"}.get(character) or (character.lower() if len(character.lower()) == 1 else character)


def _runs(folded: str, needles: frozenset[str]) -> Iterator[tuple[int, int]]:
    """(first, end) of every run of characters that parts of the secret cover."""
    first = end = -1
    for position in range(len(folded) - MIN_SECRET + 1):
        if folded[position : position + MIN_SECRET] not in needles:
            continue
        if position > end:
            if end > 0:
                yield first, end
            first = position
        end = position + MIN_SECRET
    if end > 0:
        yield first, end


def _tells(run: str, secret: str) -> bool:
    """Whether a part reveals something: letters and digits mixed, or half of the secret. Others may be a word in it."""
    mixed = any(character.isdigit() for character in run) and any(character.isalpha() for character in run)
    return mixed or 2 * len(run) >= len(secret)


@functools.cache
def _detectors() -> tuple[Any, ...]:
    # Loaded here, because it takes a tenth of a second and only configs need it. Nothing is sent anywhere: what asks
    # servers whether a key is valid are other methods of these classes.
    from importlib import import_module

    return tuple(getattr(import_module(f"detect_secrets.plugins.{module}"), name)() for module, name in _DETECTORS)


def _is_secret(value: str, name: str) -> bool:
    if _VALUES.search(value) or any(_is_credentials(match[1]) for match in _BASIC.finditer(value)):
        return True
    if any(next(iter(detector.analyze_string(value)), None) for detector in _detectors()):
        return True
    if _DIGEST_FIELDS.search(name):
        return False
    if _WHOLE_RUN.fullmatch(value) and "/" not in value.strip("/") and _is_random(value):
        return True
    return any(_is_random(match[0]) and not _is_digest(value, match) for match in _RUN.finditer(value))


def _is_named_secret(value: str, name: str, under_policy: bool) -> bool:
    if _SECRET_NAMES.search(name):
        # Without a space, and with a digit: no phrase of a game.
        password = len(value) >= MIN_SECRET and not re.search(r"\s", value) and re.search(r"\d", value) is not None
        return under_policy or password
    longest_word = 7 if under_policy else 15
    return bool(_OPEN_NAMES.search(name)) and (
        len(value) > longest_word and re.fullmatch(r"[A-Za-z0-9+/=-]+", value) is not None and _is_random(value)
    )


def _is_credentials(text: str) -> bool:
    """Whether base64 holds "user:password"."""
    try:
        decoded = base64.b64decode(text.translate({45: "+", 95: "/"}) + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        return False
    return b":" in decoded and decoded.isascii() and decoded.decode().isprintable()


def _is_random(text: str) -> bool:
    """Whether letters and digits are mixed as in random text, and not as in words with numbers."""
    kinds = ["digit" if character.isdigit() else "lower" if character.islower() else "upper" for character in text]
    digits = kinds.count("digit")
    if len(set(kinds)) == 1 or not digits or len(set(text)) < 7:
        return False
    if len(set(kinds)) == 2:
        return digits >= 3
    # Names in camel case change between the kinds less often, and hold fewer digits.
    changes = sum(before != after for before, after in itertools.pairwise(kinds))
    return digits >= 2 and changes >= 0.4 * len(text)


def _is_digest(value: str, match: re.Match[str]) -> bool:
    """Whether a run is the hexadecimal name of a version or of a file's content, as in a path of the hub's cache."""
    if not _HEX.fullmatch(match[0]):
        return False
    before, after = value[: match.start()], value[match.end() :]
    is_path = not re.match(r"(?i)https?://", value) and (before.endswith("/") or after.startswith(("/", ".")))
    # sha256 and sha512 are longer than keys in hexadecimal, most of which have 32 or 40 digits.
    return is_path or _DIGEST_MARK.search(before) is not None


def _texts(node: Any, where: str, name: str) -> Iterator[tuple[str, str, str]]:
    """(field, name, text) of every text: the name is the last key above it."""
    if isinstance(node, str):
        yield where, name, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _texts(value, f"{where}.{key}" if where else str(key), str(key))
            # A key of a dictionary may be one of the other kind.
            if isinstance(key, str):
                yield where, "", key
    elif isinstance(node, list):
        for index, value in enumerate(node):
            # ["X-Api-Key", "..."], as lists of headers have it, and ["--token", "..."].
            before = node[index - 1] if index and isinstance(node[index - 1], str) else ""
            named = before.lstrip("-") if _SECRET_NAMES.search(before) else name
            yield from _texts(value, f"{where}[{index}]", named)
