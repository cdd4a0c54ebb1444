"""Addresses of shard sets in stores: which text is one, and which secrets are refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from esvit_scale import config as configs
from esvit_scale import store_urls
from esvit_scale.data import stream
from esvit_scale.errors import UserError


@pytest.mark.parametrize(
    ("data", "variable"),
    [
        ({"train": "s3://b/s", "storage_options": {"key": "A", "secret": "hush"}}, "AWS_SECRET_ACCESS_KEY"),
        ({"train": "s3://b/s", "storage_options": {"client_kwargs": {"aws_secret_access_key": "hush"}}}, "AWS_"),
        ({"train": "az://b/s", "storage_options": {"account_key": "hush"}}, "AZURE_STORAGE_CONNECTION_STRING"),
        ({"train": "gs://b/s", "storage_options": {"token": "hush"}}, "GOOGLE_APPLICATION_CREDENTIALS"),
        ({"train": "hf://datasets/a/b", "storage_options": {"token": "hush"}}, "HF_TOKEN"),
        ({"train": "https://u:hush@host/set"}, "FSSPEC_HTTPS"),
        ({"train": "https://hush@host/set"}, "FSSPEC_HTTPS"),
        ({"train": "https://host/set?X-Amz-Signature=hush"}, "FSSPEC_HTTPS"),
        ({"mix": [{"urls": "https://host/set?sig=hush"}]}, "FSSPEC_HTTPS"),
        ({"train": "s3://b/s", "storage_options": {"endpoint_url": "https://u:hush@minio"}}, "AWS_SECRET_ACCESS_KEY"),
        ({"train": "s3://b/s", "storage_options": {"config_kwargs": {"proxies": {"http": "http://u:hush@p"}}}}, "AWS_"),
        ({"train": "https://h/s", "storage_options": {"headers": [["X-Auth", "hush"]]}}, "FSSPEC_HTTPS"),
        ({"train": "https://h/s", "storage_options": {"headers": {"X-Mine": "Bearer hush"}}}, "FSSPEC_HTTPS"),
        ({"train": "https://h/s", "storage_options": {"urls": ["https://h/?token=hush"]}}, "FSSPEC_HTTPS"),
        ({"train": "https://h/x-{000..9}.tar?token=hush"}, "'pipe:curl -fsSL \"URL?token=$SECRET\"'"),
        ({"train": "sftp://u:hush@h/x-{000..9}.tar"}, "'pipe:curl -fsSL --netrc \"URL\"'"),
    ],
)
def test_secrets_are_refused_and_not_repeated(data: dict[str, Any], variable: str, tmp_path: Path) -> None:
    c = configs.validate({"data": data, "run_dir": str(tmp_path / "run")}, where="test")
    with pytest.raises(UserError, match=re.escape(variable)) as caught:
        configs.require_training_data(c)
    assert "hush" not in str(caught.value)


def test_configs_of_old_runs_with_secrets_are_read_and_continued(tmp_path: Path) -> None:
    old = {"data": {"train": "https://h/x-{000..9}.tar?token=hush"}, "run_dir": str(tmp_path / "run")}
    c = configs.validate(old, where="test")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(configs.dump(c))
    assert configs.load(tmp_path / "run" / "config.yaml") == c
    configs.require_training_data(c)
    with_more = {"train": "https://u:hush@h/x.tar?token=hush"}
    with pytest.raises(UserError, match=r"^data\.train: the URL holds a user name or password"):
        configs.require_training_data(configs.validate(old | {"data": with_more}, where="test"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"run_dir": "s3://b/run"}, r"run_dir: s3://b/run is an address.*train\.mirror"),
        ({"run_dir": "s3:/b/run"}, "run_dir: s3:/b/run is an address"),
        ({"data": {"cache_dir": "gs://b/cache"}}, "data.cache_dir: gs://b/cache is an address"),
        ({"data": {"train": "s3:/b/set"}}, r"data.train: s3:/b/set: did you mean s3://b/set\?"),
        ({"train": {"mirror": "S3://b/runs"}}, r"train.mirror: S3://b/runs: did you mean s3://b/runs\?"),
    ],
)
def test_addresses_at_the_wrong_place_or_mistyped_are_refused(override: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        configs.validate(override, where="test")


def test_what_an_address_was_meant_to_be() -> None:
    for place in ("s3://b/set", "pipe:aws s3 cp s3://b/x.tar -", "photos/train", "s3", "hf://datasets/u/n", "./s3:/b"):
        assert store_urls.address_meant(place) is None
    assert store_urls.address_meant("HF:/datasets/u/n") == "hf://datasets/u/n"


def test_user_names_without_passwords_are_taken() -> None:
    for url in ("sftp://alice@h/x.tar", "hdfs://alice@nn/set", "az://container@account.blob/set", "s3://[broken/x@y:z"):
        assert store_urls.secret_in_url(url) is None


def test_options_without_secrets_are_taken(tmp_path: Path) -> None:
    options = {"anon": True, "endpoint_url": "http://127.0.0.1:1", "profile": "lab", "requester_pays": True}
    options["config_kwargs"] = {
        "signature_version": "s3v4",
        "s3": {"addressing_style": "path"},
        "proxies": ["http://p:8"],
    }
    assert store_urls.secret_in_options(options, ["s3://b/s"]) is None
    for token in ("anon", "google_default", False, None):
        assert store_urls.secret_in_options({"token": token}, ["gs://b/s"]) is None
    assert store_urls.secret_in_options({"token": "ya29.hush"}, ["gs://b/s"]) is not None
    c = configs.validate({"data": {"train": "s3://b/s", "storage_options": options}}, where="test")
    assert configs.validate(json.loads(c.model_dump_json()), where="again").data.storage_options == options


def test_urls_of_sets_and_of_plain_tars() -> None:
    assert all(map(store_urls.is_set_url, ["s3://b/set", "https://h/a/set/", "hf://datasets/u/n", "memory://x"]))
    plain = [
        "s3://b/{000..123}.tar",
        "https://h/x.tar",
        "pipe:aws s3 cp s3://b/x.tar -",
        "/data/set",
        "set",
        "https://h/x.tgz",
        "https://h/x.tar?versionId=7",
        "https://h/x.tar.gz#part",
        "https://h/get?file=x.tar",
        "https://h/x-{0..3}.tar?versionId=7",
    ]
    assert not any(map(store_urls.is_set_url, plain))


@pytest.mark.parametrize(
    ("train", "problem"), [("", "s3://b/set is a shard set in a store and cannot be"), ("s3://b/set", "data.train is")]
)
def test_mix_of_remote_set_and_plain_tars_is_an_error(train: str, problem: str) -> None:
    mix = [{"urls": "s3://b/set"}, {"urls": "https://h/x.tar"}]
    c = configs.validate({"data": {"train": train, "mix": mix, "epoch_samples": 8}}, where="test")
    with pytest.raises(UserError, match=rf"^data\.mix: {problem}"):
        stream.open_data(c)
