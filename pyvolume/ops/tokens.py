"""Signed tokens (JWT) by PyJWT, which brings the whole of `cryptography` along, a tenth of a start.

Imported by a start or a reload with a signing key, else by ops.auth with the first token. Must not import
server or storage.
"""

from __future__ import annotations

import hashlib
from typing import Any

import jwt
from jwt.algorithms import HMACAlgorithm

_ALGORITHMS = ("HS256", "HS384", "HS512")


class BadToken(ValueError):
    """A token that counts for nothing; the text is upstream's and holds nothing of the token."""


class _Hmac(HMACAlgorithm):
    """HMAC without PyJWT's advice on key length: operators choose the key, masters and filers must agree on it."""

    def check_key_length(self, key: bytes) -> str | None:
        return None


def _verifier() -> jwt.PyJWS:
    jws = jwt.PyJWS(algorithms=_ALGORITHMS)
    for name, digest in zip(_ALGORITHMS, (hashlib.sha256, hashlib.sha384, hashlib.sha512), strict=True):
        jws.unregister_algorithm(name)
        jws.register_algorithm(name, _Hmac(digest))
    return jws


class _Tokens(jwt.PyJWT):
    """PyJWT with the registered claims checked that upstream checks: exp and nbf if present, no leeway."""

    def __init__(self) -> None:
        super().__init__(
            {
                "verify_exp": True,
                "verify_nbf": True,
                "verify_iat": False,
                "verify_aud": False,
                "verify_iss": False,
                "verify_sub": False,
                "verify_jti": False,
            }
        )
        self._jws = _verifier()


_TOKENS = _Tokens()
_REASONS = (
    (jwt.ExpiredSignatureError, "token has invalid claims: token is expired"),
    (jwt.ImmatureSignatureError, "token has invalid claims: token is not valid yet"),
    (jwt.InvalidAlgorithmError, "token signature is invalid: signing method is invalid"),
    (jwt.InvalidSignatureError, "token signature is invalid: signature is invalid"),
)


def claims_of(key: bytes, token: str) -> dict[str, Any]:
    """What a token claims, if it is signed with `key` and valid now. Raises BadToken."""
    try:
        claims: dict[str, Any] = _TOKENS.decode(token, key, algorithms=list(_ALGORITHMS))
    except (jwt.PyJWTError, ValueError, TypeError, OverflowError) as exc:
        raise BadToken(_reason(exc)) from None
    return claims


def _reason(error: Exception) -> str:
    """Upstream's words; never anything that the token holds."""
    for kind, text in _REASONS:
        if isinstance(error, kind):
            return text
    return "token is malformed"
