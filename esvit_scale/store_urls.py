"""Addresses of shard sets in object stores: which text is one, and the refusal of secrets in addresses and options.

Config, run dirs, logs and checkpoints record `data.train` and `data.storage_options` as they are written, so a secret
must not be in them. The libraries that speak to the stores read credentials from the environment or their own files.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

TAR_OR_PATTERN = re.compile(r"[{}]|\.tar(\.(gz|bz2|xz|zst))?$|\.tgz$", re.IGNORECASE)
SECRET = re.compile(
    r"secret|token|password|passwd|signature|credential|authorization|connection_?string|cookie|sas\b|api_?key"
    r"|(^|[_-])(key|keys|sig|auth|pass|pat)$|^(account|access|shared)_?key",
    re.IGNORECASE,
)
WHERE = {  # protocol → where its library looks for credentials
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or name a profile in AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "hf": "HF_TOKEN",
    "https": 'FSSPEC_HTTPS, such as FSSPEC_HTTPS=\'{"client_kwargs": {"headers": {…}}}\'',
}
SAME_AS = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "adl": "az", "http": "https"}


def protocol(place: str) -> str:
    """Return the protocol of a URL under its usual name (`s3`, `gs`, `az`, `hf`, `https`, …), "" for a path."""
    name = place.partition("://")[0] if "://" in place and not place.startswith("pipe:") else ""
    return SAME_AS.get(name, name)


def is_set_url(place: str) -> bool:
    """Return whether `place` is the URL of a folder, hence of an indexed shard set, rather than of plain tars or a path."""
    return bool(protocol(place)) and not TAR_OR_PATTERN.search(place)


def join(url: str, name: str) -> str:
    """Return the URL of an object below the URL of a folder."""
    return f"{url.rstrip('/')}/{name}"


def secret_in_url(place: str) -> str | None:
    """Return an error message if a URL holds a password or a signed query, else None; the message does not repeat it."""
    kind = protocol(place)
    if not kind:
        return None
    parts = urlsplit(place)
    signed = next((name for name, _ in parse_qsl(parts.query, True) if _is_secret(name)), None)
    if "@" in parts.netloc and (":" in parts.netloc.rpartition("@")[0] or kind not in ("az", "hf")):
        return _refusal("the URL holds a user name or password", kind)
    return _refusal(f"the URL's query holds a secret ({signed})", kind) if signed else None


def secret_in_options(options: Mapping[str, Any], places: list[str]) -> str | None:
    """Return an error message if storage options hold a secret, else None.

    Args:
        places: the addresses that the options are used for; the message names the environment variable of the first.
    """
    found = next((name for name in _names(options) if _is_secret(name)), None)
    kind = next((k for place in places if (k := protocol(place))), "s3")
    return _refusal(f"{found} is a secret", kind) if found else None


def _names(options: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all values in nested dicts."""
    for name, value in options.items() if isinstance(options, Mapping) else ():
        yield f"{prefix}{name}"
        yield from _names(value, f"{prefix}{name}.")


def _is_secret(name: str) -> bool:
    return SECRET.search(name.rpartition(".")[2]) is not None


def _refusal(what: str, kind: str) -> str:
    place = WHERE.get(kind, f"the environment variable FSSPEC_{kind.upper()} (a JSON object)")
    return f"{what}, which configs and logs would record; remove it and set {place}"
