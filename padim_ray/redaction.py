"""Redact credentials in URIs and in storage options that were written out as text.

Two kinds of URI hold credentials: `https://user:password@host/…` (and sftp, ftp, smb), and
presigned URIs, which have a signature in their query. URIs of S3, GCS and Azure hold none, since
their credentials are storage options; what precedes the @ of `abfs://container@account` is a name.
"""

import re

HIDDEN = "***"
_USERINFO = re.compile(
    r"""
    (?P<scheme>\b[a-z][a-z0-9+.-]{0,30}://)
    (?:(?<=http://)|(?<=https://)|(?=[^\s/?\#@]*:))  # without a password: secret in HTTP only
    [^\s/?\#"'<>]*@
    """,
    re.VERBOSE | re.IGNORECASE,
)
_PARAMETER = re.compile(
    r"""
    (?P<name>[?&](?:amp;)?
        (?: x-(?:amz|goog|oss|ms|cos|obs)-[\w-]+
          | (?:aws|oss|google|goog)?access_?(?:key)?_?id | key-pair-id | policy
          | s[verpt]|sig|spr|ske|sks|skt|skv|skoid|sktid|srt|ss   # Azure's shared access signature
          | [\w.-]{0,40} (?: signature | token | secret | passw(?:or)?d | passphrase | credentials?
                      | api[_-]?key | (?:access|account|private)[_-]?key | jwt | hmac )
          | key | pwd | pass | auth | authorization | code | session(?:id)? | sas | sign
        )=)
    [^&\s"'<>\#]+
    """,
    re.VERBOSE | re.IGNORECASE,
)
_OPTION = re.compile(  # a mapping's item, as JSON and Python write it
    r"""
    (?P<name>(?P<quote>["'])
        (?:\w*(?:secret|token|password|credentials?|connection_string|authorization)\w*|\w*key(?:_id)?)
    (?P=quote)\s*:\s*["'])
    [^"']+
    """,
    re.VERBOSE | re.IGNORECASE,
)


def redact(text: str) -> str:
    """Replace the secrets in a text's URIs and options by ***; everything else stays.

    >>> redact("https://ann:pa55@host/a.png?width=9&X-Amz-Signature=5ig")
    'https://***@host/a.png?width=9&X-Amz-Signature=***'
    """
    if "@" in text:
        text = _USERINFO.sub(rf"\g<scheme>{HIDDEN}@", text)
    if "=" in text:
        text = _PARAMETER.sub(rf"\g<name>{HIDDEN}", text)
    if ":" in text:
        text = _OPTION.sub(rf"\g<name>{HIDDEN}", text)
    return text
