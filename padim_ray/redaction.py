"""Texts without the credentials that URIs in them, or options written out in them, hold.

Which URIs can: `https://user:password@host/…` and the like of sftp, ftp or smb, and presigned ones,
whose query holds a signature. S3's, GCS's and Azure's own schemes can't: their credentials are
storage options (and what is before the @ of `abfs://container@account` is no secret).
"""

import re

HIDDEN = "***"
_USERINFO = re.compile(
    r"""
    (?P<scheme>\b[a-z][a-z0-9+.-]{0,30}://)
    (?:(?<=http://)|(?<=https://)|(?=[^\s/?\#@]*:))  # a name alone is a secret in HTTP only
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
_OPTION = re.compile(  # as JSON and Python write it
    r"""
    (?P<name>(?P<quote>["'])
        (?:\w*(?:secret|token|password|credentials?|connection_string|authorization)\w*|\w*key(?:_id)?)
    (?P=quote)\s*:\s*["'])
    [^"']+
    """,
    re.VERBOSE | re.IGNORECASE,
)


def redact(text: str) -> str:
    """A text with *** for what is secret in its URIs, whatever else stands in it.

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
