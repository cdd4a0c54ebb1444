"""Addresses of shard sets in object stores: which text is one, and the refusal of secrets in addresses and options.

Config, run dirs, logs and checkpoints record `data.train` and `data.storage_options` as they are written, so a secret
must not be in them. The libraries that speak to the stores read credentials from the environment or their own files.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl

TAR = re.compile(r"\.(tar(\.(gz|bz2|xz|zst))?|tgz)$", re.IGNORECASE)
SECRET = re.compile(
    r"secret|token|password|passwd|credential|authorization|connection_?string|cookie|sas\b|api_?key"
    r"|(^|[_-])(key|keys|sig|signature|auth|pass|pat)$|^(account|access|shared)_?key",
    re.IGNORECASE,
)
# Values under such a name that are none: gcsfs's `token` names a way to log in.
NO_SECRETS = (None, True, False, "anon", "browser", "cache", "cloud", "google_default")
SECRET_VALUE = re.compile(r"(bearer|basic)\s", re.IGNORECASE)  # of an Authorization header, wherever it stands
WHERE = {  # protocol → where its library looks for credentials
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or name a profile in AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "hf": "HF_TOKEN",
    "https": 'FSSPEC_HTTPS, such as FSSPEC_HTTPS=\'{"client_kwargs": {"headers": {…}}}\'',
}
ADDRESS = re.compile(r"(s3a?|gs|gcs|az|abfss?|adl|hf|https?):/*([^/].*)", re.IGNORECASE)
SAME_AS = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "adl": "az", "http": "https"}


def protocol(place: str) -> str:
    """Return the protocol of a URL under its usual name (`s3`, `gs`, `az`, `hf`, `https`, …), "" for a path."""
    name = place.partition("://")[0] if "://" in place and not place.startswith("pipe:") else ""
    return SAME_AS.get(name, name)


def is_set_url(place: str) -> bool:
    """Return whether `place` is the URL of a folder, hence of an indexed shard set, and not of plain tars or a path."""
    if not protocol(place) or "{" in place or "}" in place:
        return False
    return not (TAR.search(place) or TAR.search(re.split("[?#]", place)[0]))


def address_meant(place: str) -> str | None:
    """Return the address that a text such as `s3:/bucket/set` or `S3://bucket/set` was probably meant to be, else None."""
    match = ADDRESS.fullmatch(place)
    meant = f"{match[1].lower()}://{match[2]}" if match else place
    return meant if meant != place else None


def join(url: str, name: str) -> str:
    """Return the URL of an object below the URL of a folder."""
    return f"{url.rstrip('/')}/{name}"


def credentials(url: str) -> str:
    """Return where the library of a URL's protocol looks for credentials, as the end of an error message."""
    kind = protocol(url)
    return WHERE.get(kind, f"the environment variable FSSPEC_{kind.upper()} (a JSON object)")


def secret_in_url(place: str) -> str | None:
    """Return an error message if a URL holds a password or a signed query, else None; the message does not repeat it.

    A user name alone is a secret in https, where it is a token in most cases, and none in other protocols.
    """
    kind = protocol(place)
    if not kind:
        return None
    address, _, query = place.partition("://")[2].partition("#")[0].partition("?")
    user, at, _ = address.partition("/")[0].rpartition("@")
    if at and (":" in user or kind == "https"):
        return _refusal("the URL holds a user name or password", place, 'curl -fsSL --netrc "URL"')
    signed = next((name for name, _ in parse_qsl(query, True) if _is_secret(name)), None)
    command = f'curl -fsSL "URL?{signed}=$SECRET"'
    return _refusal(f"the URL's query holds a secret ({signed})", place, command) if signed else None


def secret_in_options(options: Mapping[str, Any], places: list[str]) -> str | None:
    """Return an error message if storage options hold a secret, by a name or as a part of a value, else None.

    Args:
        places: the addresses that the options are used for; the message names the environment variable of the first.
    """
    named = ((name, value) for name, value in _items(options) if value not in NO_SECRETS)
    found = next((name for name, value in named if _is_secret(name) or _holds_secret(value)), None)
    place = next((place for place in places if protocol(place)), "s3://")
    return _refusal(f"{found} {'is' if _is_secret(found) else 'holds'} a secret", place) if found else None


def _items(options: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted name and value of all items in nested dicts and lists; a list of (name, value) pairs counts as a dict."""
    if isinstance(options, Mapping):
        pairs = list(options.items())
    elif isinstance(options, list | tuple):
        is_pair = [isinstance(one, list | tuple) and len(one) == 2 and isinstance(one[0], str) for one in options]
        pairs = [tuple(one) if pair else (i, one) for i, (one, pair) in enumerate(zip(options, is_pair, strict=True))]
    else:
        return
    for name, value in pairs:
        yield f"{prefix}{name}", value
        yield from _items(value, f"{prefix}{name}.")


def _is_secret(name: str) -> bool:
    return SECRET.search(name.rpartition(".")[2]) is not None


def _holds_secret(value: Any) -> bool:
    return isinstance(value, str) and (secret_in_url(value) is not None or SECRET_VALUE.match(value) is not None)


def _refusal(what: str, place: str, command: str = "") -> str:
    """Return an error message about a secret, with what to do instead.

    Args:
        what: says which secret was found, and where.
        place: the address that the secret is for.
        command: a shell command that reads plain tars at that address, which no library with credentials does.
    """
    start = f"{what}, which configs and logs would record; remove it and"
    if command and not is_set_url(place):
        return f"{start} read the tars by a command that knows it, such as data.train='pipe:{command}'"
    return f"{start} set {credentials(place)}"
