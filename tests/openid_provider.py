"""A small OpenID provider for tests: real HTTP on loopback, with discovery, keys and the device grant (RFC 8628)."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs

from joserfc import jwt
from joserfc.jwk import ECKey, Key

CLIENT_ID = "shoal-of-tests"
DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"


class OpenIdProvider:
    """Signs with `keys[0]`, publishes all of `keys`, and counts what it is asked.

    Attributes:
        answers: what the token endpoint says to a device code, in turn: an error's name, or claims of a token.
        documents: what stands in for a document, by path.
        down: whether every answer is 500.
        answering: cleared, it lets everybody wait.
    """

    def __init__(self) -> None:
        self.keys: list[Key] = [new_key("first")]
        self.asked: Counter[str] = Counter()
        self.answers: list[str | dict[str, Any]] = []
        self.documents: dict[str, Any] = {}
        self.refresh_tokens: dict[str, dict[str, Any]] = {}
        self.revoked: list[str] = []
        self.down = False
        self.answering = threading.Event()
        self.answering.set()
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                text = self.rfile.read(int(self.headers["Content-Length"])).decode()
                self._answer({name: values[0] for name, values in parse_qs(text).items()})

            def _answer(self, form: dict[str, str]) -> None:
                provider.asked[self.path] += 1
                provider.answering.wait(10)
                status, said = (500, {}) if provider.down else provider._answer(self.path, form)
                body = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.issuer = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def claims(self, *groups: str, **changed: Any) -> dict[str, Any]:
        now = int(time.time())
        made = {
            "iss": self.issuer,
            "aud": CLIENT_ID,
            "sub": "248289761001",
            "preferred_username": "ada",
            "groups": list(groups),
            "iat": now,
            "exp": now + 300,
        }
        return {name: value for name, value in (made | changed).items() if value is not None}

    def sign(self, claims: dict[str, Any], key: Key | None = None, **header: Any) -> str:
        signer = key or self.keys[0]
        return jwt.encode({"alg": "ES256", "kid": signer.kid, **header}, claims, signer, [header.get("alg", "ES256")])

    def token(self, *groups: str, **changed: Any) -> str:
        return self.sign(self.claims(*groups, **changed))

    def _answer(self, path: str, form: dict[str, str]) -> tuple[int, Any]:
        if path in self.documents:
            return 200, self.documents[path]
        if path == "/.well-known/openid-configuration":
            return 200, {
                "issuer": self.issuer,
                "jwks_uri": f"{self.issuer}/keys",
                "device_authorization_endpoint": f"{self.issuer}/device",
                "token_endpoint": f"{self.issuer}/token",
                "revocation_endpoint": f"{self.issuer}/revoke",
                "scopes_supported": ["openid", "profile", "groups", "offline_access"],
            }
        if path == "/keys":
            return 200, {"keys": [key.as_dict(private=False) for key in self.keys]}
        if path == "/device" and form["client_id"] == CLIENT_ID:
            self.scope = form["scope"]
            return 200, {
                "device_code": "the-device-code",
                "user_code": "WDJB-MJHT",
                "verification_uri": f"{self.issuer}/activate",
                "expires_in": 60,
                "interval": 1,
            }
        if path == "/token" and form["client_id"] == CLIENT_ID:
            return self._tokens(form)
        if path == "/revoke":
            self.revoked.append(form["token"])
            return 200, {}
        return 404, {}

    def _tokens(self, form: dict[str, str]) -> tuple[int, Any]:
        claims: str | dict[str, Any] | None = None
        if form["grant_type"] == DEVICE_GRANT and form["device_code"] == "the-device-code":
            claims = self.answers.pop(0)
        elif form["grant_type"] == "refresh_token":
            claims = self.refresh_tokens.pop(form["refresh_token"], "invalid_grant")
        if not isinstance(claims, dict):
            return 400, {"error": claims or "unsupported_grant_type"}
        fresh = f"refresh-{len(self.refresh_tokens)}-{self.asked['/token']}"
        self.refresh_tokens[fresh] = self.claims(*claims["groups"])
        return 200, {"access_token": "opaque", "id_token": self.sign(claims), "refresh_token": fresh}


def new_key(kid: str) -> Key:
    return ECKey.generate_key("P-256", {"kid": kid, "use": "sig"})
