import pickle

import pytest

from padim_ray.errors import ImageError, ModelError, PadimError, TooManyFailed

SIGNED = "https://host/a.png?sig=abc"


@pytest.mark.parametrize("kind", [PadimError, ModelError, TooManyFailed])
def test_errors_hold_no_credentials(kind):
    error = kind(f"Can't read {SIGNED}", 7)
    assert error.args == ("Can't read https://host/a.png?sig=***", 7)


def test_an_image_s_error_says_stage_cause_and_detail():
    assert str(ImageError("fetch", "not found")) == "fetch: not found"
    error = ImageError("fetch", "OSError", SIGNED)
    assert str(error) == "fetch: OSError (https://host/a.png?sig=***)"


def test_an_image_s_error_can_be_sent_to_another_process():
    error = ImageError("decode", "broken image", "its data end early")
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is ImageError
    assert arrived.args == error.args
