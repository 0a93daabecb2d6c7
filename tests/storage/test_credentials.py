import json
import logging
import traceback
from urllib.parse import quote, quote_plus

import pytest

from padim_ray import PadimError
from padim_ray.storage.credentials import RedactingFilter, Secrets, hidden_credentials

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfi=CYEX&KEY"


@pytest.mark.parametrize(
    "options",
    [
        {"key": SECRET},
        {"secret": SECRET},
        {"connection_string": f"AccountName=x;AccountKey={SECRET};y=z"},
        {"client_kwargs": {"headers": {"Authorization": f"Bearer {SECRET}"}}},
        {"s3": {"secret": SECRET}, "https": {"headers": {"Authorization": f"Bearer {SECRET}"}}},
        {"config_kwargs": {"proxies": [{"password": SECRET}]}},
        {"sas_token": SECRET, "token": {"private_key": "short"}},
    ],
)
def test_values_of_secret_options_are_redacted_however_they_are_quoted(options):
    secrets = Secrets.of(options, {})
    for written in (SECRET, quote(SECRET), quote(SECRET, safe=""), quote_plus(SECRET)):
        assert secrets.redact(f"x{written}y") == "x***y"
    assert SECRET not in secrets.redact(json.dumps(options))
    assert SECRET not in repr(secrets)


def test_values_of_secret_variables_are_redacted():
    environment = {"AWS_SECRET_ACCESS_KEY": "aaaaaaaa", "RAY_AUTH_TOKEN": "bbbbbbbb"}
    environment |= {"AWS_SESSION_TOKEN": "cccccccc", "AWS_ACCESS_KEY_ID": "aaaaaaaadddd"}
    environment |= {"HOME": "/home/ann", "SHORT_TOKEN": "abc"}
    secrets = Secrets.of(None, environment)
    text = secrets.redact("aaaaaaaa bbbbbbbb cccccccc aaaaaaaadddd /home/ann abc")
    assert text == "*** *** *** *** /home/ann abc"


def test_other_options_are_no_secrets():
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


def test_a_record_whose_arguments_do_not_fit_is_redacted(log, caplog):
    redacting = RedactingFilter(Secrets(frozenset({SECRET})))
    log.addFilter(redacting)
    try:
        log.info("%d images of %s", SECRET)
    finally:
        log.removeFilter(redacting)
    assert caplog.messages == ["%d images of %s ('***',)"]


def test_errors_hold_no_secret():
    with pytest.raises(PadimError) as error, hidden_credentials({"secret": SECRET}):
        try:
            raise OSError(f"refused {SECRET}")
        except OSError as cause:
            raise PadimError("Can't read http://ann:pa55@host") from cause
    assert str(error.value) == "Can't read http://***@host"
    printed = "".join(traceback.format_exception(error.value))
    assert SECRET not in printed and "pa55" not in printed


def test_errors_without_secrets_keep_their_causes():
    with pytest.raises(PadimError) as error, hidden_credentials({"secret": SECRET}):
        raise PadimError("no bucket") from OSError("why")
    assert isinstance(error.value.__cause__, OSError)
