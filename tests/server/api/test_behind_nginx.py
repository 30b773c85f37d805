"""nginx, with the configuration that `deploy/proxy` ships, before an api process: TLS, a path, big bodies."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from PIL import Image

from server.api.http import HttpConnection
from server.settings import Settings
from server.supervisor.valkey import die_with_parent
from tests.server.api.running import Api, running_api
from tests.server.conftest import poll

SHIPPED = Path(__file__).resolve().parents[3] / "deploy/proxy/nginx.conf"
PUBLIC_URL = "https://example.com/tdm"
AROUND = """
daemon off;
{user}
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/shipped.conf;
}}
"""


@pytest.fixture
async def api(settings: Settings) -> AsyncIterator[Api]:
    async with running_api(settings.model_copy(update={"public_url": PUBLIC_URL})) as api:
        api.worker.announce()
        yield api


@pytest.fixture
async def port(api: Api) -> AsyncIterator[int]:
    """Of the api process on a real socket."""
    config = uvicorn.Config(api.app, http=HttpConnection, ws="none", log_config=None, lifespan="off", port=0)
    process = uvicorn.Server(config)
    config.load()
    process.lifespan = config.lifespan_class(config)
    await process.startup()
    yield process.servers[0].sockets[0].getsockname()[1]
    await process.shutdown()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A folder with a key and a certificate for example.com that nobody has signed."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    names = ["-subj", "/CN=example.com", "-addext", "subjectAltName=DNS:example.com"]
    files = ["-keyout", str(tmp_path / "privkey.pem"), "-out", str(tmp_path / "fullchain.pem")]
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subprocess.run(["openssl", "req", "-x509", *key, *names, *files], check=True, capture_output=True)
    return tmp_path


@pytest.fixture
def nginx(certificate: Path, port: int, tmp_path: Path) -> Iterator[Path]:
    """The socket on which it speaks TLS."""
    binary = shutil.which("nginx")
    if binary is None:
        pytest.skip("nginx is not installed (apt install nginx-light)")
    socket, text = tmp_path / "tls.sock", SHIPPED.read_text()
    for shipped, here in {
        "127.0.0.1:8000": f"127.0.0.1:{port}",
        "listen 443 ssl": f"listen unix:{socket} ssl",
        "/etc/nginx/tls": str(certificate),
    }.items():
        assert shipped in text
        text = text.replace(shipped, here)
    (tmp_path / "shipped.conf").write_text(text)
    user = "" if os.getuid() else "user root;"  # or its workers may not write into pytest's folder
    (tmp_path / "nginx.conf").write_text(AROUND.format(folder=tmp_path, user=user))
    command = [binary, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
    checked = subprocess.run([*command, "-t"], check=False, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "[warn]" not in checked.stderr
    process = subprocess.Popen(
        command,
        preexec_fn=die_with_parent(),  # noqa: PLW1509 - one prctl call, looked up before the fork
    )
    poll(socket.exists)
    yield socket
    process.terminate()
    process.wait()


@pytest.fixture
async def http(nginx: Path, certificate: Path) -> AsyncIterator[httpx.AsyncClient]:
    trusted = ssl.create_default_context(cafile=str(certificate / "fullchain.pem"))
    transport = httpx.AsyncHTTPTransport(uds=str(nginx), verify=trusted)
    async with httpx.AsyncClient(transport=transport, base_url=PUBLIC_URL, timeout=120.0) as http:
        yield http


async def test_picture_is_found_where_its_link_leads(api: Api, http: httpx.AsyncClient) -> None:
    asked = http.post(f"{PUBLIC_URL}/v1/images", json={"prompt": "a red cube"})
    response, _ = await asyncio.gather(asked, asyncio.to_thread(api.worker.draw))
    assert response.status_code == 200
    (picture,) = response.json()["data"]
    assert picture["url"].startswith(f"{PUBLIC_URL}/v1/images/")
    found = await http.get(picture["url"])
    assert found.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(found.content)).size == (64, 64)


async def test_what_the_api_refuses_is_said_in_its_words(http: httpx.AsyncClient) -> None:
    refused = await http.post(f"{PUBLIC_URL}/v1/images", json={"prompt": "a" * 100_000})
    assert refused.status_code == 413
    assert refused.json()["error"]["code"] == "body_too_large"
    assert (await http.get(f"{PUBLIC_URL}/v1/nothing")).json()["error"]["code"] == "route_not_found"
    beside = await http.get("https://example.com/v1/models")
    assert (beside.status_code, beside.headers["content-type"]) == (404, "text/html")  # nginx's own


async def test_page_and_models_are_served_below_the_path(http: httpx.AsyncClient) -> None:
    models = (await http.get(f"{PUBLIC_URL}/v1/models")).json()
    assert [model["id"] for model in models["data"]] == ["scenes"]
    page = await http.get(f"{PUBLIC_URL}/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
