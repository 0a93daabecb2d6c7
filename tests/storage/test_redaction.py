import json
import logging
import traceback
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from padim_ray import PadimError
from padim_ray.redaction import redact
from padim_ray.storage.credentials import RedactingFilter, Secrets, hidden_credentials

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfi=CYEX&KEY"


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("https://ann:pa55@host/a.png", "https://***@host/a.png"),
        ("https://ghp_16C7e42F@host/a.png", "https://***@host/a.png"),
        ("http://ann:p@ss:w@host:80/x", "http://***@host:80/x"),
        ("see sftp://ann:pa55@host/x, please", "see sftp://***@host/x, please"),
        ("smb://ann:pa55@a/b and ftp://b:c@d/e", "smb://***@a/b and ftp://***@d/e"),
        ("SFTP://ann:@host", "SFTP://***@host"),
        ("simplecache::https://a:b@c/d", "simplecache::https://***@c/d"),
        ("http://h/a.png?token=abc", "http://h/a.png?token=***"),
        ("http://h/a b.png?w=9&sig=a%2Bb/c==&h=2#f", "http://h/a b.png?w=9&sig=***&h=2#f"),
        ("<a href='http://h/?a=1&amp;password=x'>", "<a href='http://h/?a=1&amp;password=***'>"),
        ("http://h/?access_token=a&api-key=b&API_KEY=c", None),
        ("http://h/?AWSAccessKeyId=a&Signature=b", None),
        ("http://h/?X-Amz-Credential=a%2Fb&X-Amz-Security-Token=c&x-amz-signature=d", None),
        ("http://h/?X-Goog-Signature=a&Policy=b&Key-Pair-Id=c", None),
        ("http://h/?sv=a&se=b&sp=c&sr=d&sig=e", None),
        ('{"key": "abc", "secret": "def", "anon": false}', None),
        ("{'account_key': 'abc', 'token': 'x'}", "{'account_key': '***', 'token': '***'}"),
    ],
)
def test_credentials_in_texts_are_hidden(text, redacted):
    if redacted is None:
        assert not any(f"={letter}" in redact(text) for letter in "abcde")
        assert not any(f'"{value}"' in redact(text) for value in ("abc", "def"))
        assert "***" in redact(text)
    else:
        assert redact(text) == redacted
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "plain",
            "a@b:c",
            "/data/a@b:c/x.png",
            "s3://bucket/a@b:c/x?y=1",
            "KeyError: 'groups'",
        ),
        *(
            "abfs://container@account.dfs/x",
            "sftp://ann@host/x",
            "http://host:80/a@b:c?versionId=7",
        ),
        *("gs://bucket/monkey=1", "http://h/?monkey=1&width=2", "'scores': 'a'", "k = v"),
    ],
)
def test_other_texts_stay(text):
    assert redact(text) == text


@given(st.text(), st.text())
def test_any_text_can_be_redacted(before, after):
    text = redact(f"{before} https://ann:5up3r53cr37@host/x?sig=5up3r53cr37 {after}")
    assert "5up3r53cr37" not in text


def test_long_texts_are_redacted_in_a_moment():
    for text in (
        "a+b-" * 10**5,
        "://" * 10**5,
        "&x-amz-" * 10**5,
        "http://a:" * 10**5,
        '"key"' * 10**5,
    ):
        redact(text + "@?=:")


@pytest.mark.parametrize(
    "options",
    [
        {"key": SECRET},
        {"secret": SECRET},
        {"connection_string": f"AccountName=x;AccountKey={SECRET};y=z"},
        {"client_kwargs": {"headers": {"Authorization": f"Bearer {SECRET}"}}},
        {"config_kwargs": {"proxies": [{"password": SECRET}]}},
        {"sas_token": SECRET, "token": {"private_key": "short"}},
    ],
)
def test_values_of_secret_options_are_hidden_however_they_are_written(options):
    secrets = Secrets.of(options, {})
    for written in (SECRET, quote(SECRET), quote(SECRET, safe=""), quote_plus(SECRET)):
        assert secrets.redact(f"x{written}y") == "x***y"
    assert SECRET not in secrets.redact(json.dumps(options))
    assert SECRET not in repr(secrets)


def test_values_of_secret_variables_are_hidden():
    environment = {"AWS_SECRET_ACCESS_KEY": "aaaaaaaa", "RAY_AUTH_TOKEN": "bbbbbbbb"}
    environment |= {"AWS_SESSION_TOKEN": "cccccccc", "AWS_ACCESS_KEY_ID": "aaaaaaaadddd"}
    environment |= {"HOME": "/home/ann", "SHORT_TOKEN": "abc"}
    secrets = Secrets.of(None, environment)
    text = secrets.redact("aaaaaaaa bbbbbbbb cccccccc aaaaaaaadddd /home/ann abc")
    assert text == "*** *** *** *** /home/ann abc"


def test_other_options_are_told():
    options = {"endpoint_url": "http://minio:9000", "anon": True, "client_kwargs": {"verify": "no"}}
    assert Secrets.of(options, {}) == Secrets()
    assert Secrets().redact("http://minio:9000") == "http://minio:9000"


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.DEBUG)
    return logging.getLogger("padim_ray")


def test_logs_hold_no_secret(log, caplog):
    with hidden_credentials({"secret": SECRET}):
        log.info("a %s and %d", SECRET, 3)
        log.info("%s", {"token": SECRET})
        logging.getLogger("another").warning("b %s http://ann:pa55@host", SECRET)
        try:
            raise ValueError(SECRET)
        except ValueError:
            log.exception("c", stack_info=True)
    assert caplog.messages[0] == "a *** and 3"
    assert caplog.messages[2] == "b *** http://***@host"
    assert SECRET not in caplog.text and "pa55" not in caplog.text
    assert "ValueError: ***" in caplog.text and "Stack (most recent call last)" in caplog.text
    log.info("%s", SECRET)
    assert caplog.messages[-1] == SECRET  # the filter is gone


def test_arguments_that_do_not_fit_end_nothing(log, caplog):
    log.addFilter(filter_ := RedactingFilter(Secrets(frozenset({SECRET}))))
    try:
        log.info("%d images of %s", SECRET)
    finally:
        log.removeFilter(filter_)
    assert caplog.messages == ["%d images of %s ('***',)"]


def test_errors_hold_no_secret():
    with pytest.raises(PadimError) as error, hidden_credentials({"secret": SECRET}):
        try:
            raise OSError(f"refused {SECRET}")
        except OSError as cause:
            raise PadimError("Can't read http://ann:pa55@host") from cause
    assert str(error.value) == "Can't read http://***@host"
    told = "".join(traceback.format_exception(error.value))
    assert SECRET not in told and "pa55" not in told


def test_errors_without_secrets_keep_their_causes():
    with pytest.raises(PadimError) as error, hidden_credentials({"secret": SECRET}):
        raise PadimError("no bucket") from OSError("why")
    assert isinstance(error.value.__cause__, OSError)
