"""Mistakes in addresses and options that a store's library notices only at the first request: exit 2 at once."""

from pathlib import Path
from typing import Any

import pytest

from esvit_scale.config import Data
from esvit_scale.data.remote import place, store
from esvit_scale.data.remote.store import Store
from esvit_scale.errors import UserError


@pytest.mark.parametrize("kind", [TypeError, ValueError, NotImplementedError])
def test_error_about_an_option_is_a_users_error_and_is_not_repeated(tmp_path: Path, kind: type[Exception]) -> None:
    asked = list[str]()

    def fail(path: str, **rest: Any) -> None:
        asked.append(path)
        raise kind("unexpected keyword argument 'endpont_url'")

    opened = Store(f"file://{tmp_path}", {}, tmp_path)
    opened._fs.cat_file = fail
    with pytest.raises(
        UserError, match=r"/manifest\.json: .*'endpont_url'; correct the address or data\.storage_options$"
    ):
        opened.read("manifest.json", at_start=True)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("url", "options", "word"),
    [
        ("s3://b/set", {"endpont_url": "http://127.0.0.1:9"}, "endpont_url"),
        ("s3://b/set", {"endpoint_url": "127.0.0.1:9"}, "Invalid endpoint"),
        ("s3://b/set", {"config_kwargs": {"sig_version": "s3v4"}}, "sig_version"),
        ("s3://b/set", {"config_kwargs": {"s3": {"addressing_style": "paht"}}}, "paht"),
        ("s3://my bucket/set", {"endpoint_url": "http://127.0.0.1:9"}, "Invalid bucket name"),
    ],
)
def test_mistyped_options_of_s3_are_a_users_error(
    url: str, options: dict[str, Any], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3fs")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(store, "BUDGET_S", 1.0)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "unused")
    with pytest.raises(UserError, match=word):
        place.local_folder(url, Data(storage_options=options))


def test_unknown_protocol_is_named_with_one_that_is_like_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^sss3://b/set: no library knows this protocol; did you mean 's3'\?$"):
        Store("sss3://b/set", {}, tmp_path)
