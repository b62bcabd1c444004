"""Other pages, and names that point to this machine, get nothing of the page's server."""

from __future__ import annotations

import socket

import pytest

from tests.unit.playground.harness import ADDRESS, HEADERS, Told, body, page

OWN = ["127.0.0.1:9080", "127.0.0.1", "localhost:1234", "[::1]:9080", "192.0.2.7:80"]
REBOUND = ["evil.example", "evil.example:9080", "localhost.evil.example", "127.0.0.1.evil.example"]
ODD = ["", "[", "user@evil.example", "127.0.0.1@evil.example", "evil.example#127.0.0.1"]


@pytest.mark.parametrize("host", [*OWN, socket.gethostname(), socket.gethostname().upper()])
def test_the_page_is_given_under_addresses_and_own_names(host: str) -> None:
    with page(Told()) as visitor:
        assert visitor.get("/", headers={"Host": host}).status_code == 200


def test_a_proxys_name_is_one_of_the_own_once_it_is_said() -> None:
    told = Told()
    with page(told, names=["Captions.example"]) as visitor:
        for host in ("captions.example", "captions.example:8443"):
            headers = {**HEADERS, "Host": host, "Origin": f"https://{host}"}
            response = visitor.post("/api/caption", content=body(), headers=headers)
            assert response.status_code == 200
        refused = visitor.get("/", headers={"Host": "x.captions.example"})
        assert refused.status_code == 403


@pytest.mark.parametrize("path", ["/", "/api/model", "/api/options", "/nowhere"])
@pytest.mark.parametrize("host", [*REBOUND, *ODD])
def test_names_of_others_are_refused(host: str, path: str) -> None:
    with page(Told()) as visitor:
        response = visitor.get(path, headers={"Host": host})
        assert response.status_code == 403
        assert response.json()["error"]["reason"] == "NOT_THIS_PAGE"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9081"},
        {"Origin": "http://127.0.0.1:9080.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": ADDRESS, "Sec-Fetch-Site": "cross-site"},
    ],
    ids=str,
)
def test_other_pages_cannot_ask(headers: dict[str, str]) -> None:
    told = Told()
    with page(told) as visitor:
        response = visitor.post("/api/caption", content=body(), headers={**HEADERS, **headers})
        assert response.status_code == 403
        assert not told.asked


def test_the_own_page_can() -> None:
    told = Told()
    headers = {**HEADERS, "Origin": ADDRESS, "Sec-Fetch-Site": "same-origin"}
    with page(told) as visitor:
        response = visitor.post("/api/caption", content=body(), headers=headers)
        assert response.status_code == 200
        assert len(told.asked) == 1


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", ""])
def test_kinds_of_bodies_that_any_page_may_send_are_refused(kind: str) -> None:
    told = Told()
    with page(told) as visitor:
        response = visitor.post("/api/caption", content=body(), headers={"Content-Type": kind})
        assert response.status_code == 415
        assert not told.asked


def test_no_page_is_told_that_it_may_ask_from_elsewhere() -> None:
    with page(Told()) as visitor:
        asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
        response = visitor.options("/api/caption", headers=asked)
        assert response.status_code in {403, 405}
        assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", ["/", "/app.js", "/api/options", "/nowhere"])
def test_every_answer_is_kept_from_other_pages_and_from_inline_code(path: str) -> None:
    with page(Told()) as visitor:
        headers = visitor.get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["referrer-policy"] == "no-referrer"
