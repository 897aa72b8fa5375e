"""A real local S3 server (moto's, over HTTP), and a proxy before it that breaks connections."""

import contextlib
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

BUCKET = "corpus"
SECRET = "a-secret-that-no-message-may-show"


class Proxy:
    """Forwards connections to a port on this machine, and breaks those that carry too many bytes back."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.breaks: list[int] = []
        """Bytes of response after which each of the next connections breaks."""
        self.refuses = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.refuses:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._target))
                threading.Thread(target=self._copy, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._copy, args=(server, client, True), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket, limited: bool) -> None:
        carried = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 14):
                carried += len(data)
                if self.refuses or (limited and self.breaks and carried > self.breaks[0]):
                    if self.breaks:
                        self.breaks.pop(0)
                    break
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Start the server with an empty bucket and let the environment point to it."""
    pytest.importorskip("s3fs", reason="the extra s3 is not installed")
    server_module = pytest.importorskip("moto.server", reason="moto's server is not installed")
    import s3fs

    server = server_module.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    proxy = Proxy(server.get_host_and_port()[1])
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
        "AWS_ACCESS_KEY_ID": "test-access-key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("elo.store.remote.HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("elo.store.remote.WAITS_S", (0.05, 0.1))
    request = urllib.request.Request(f"http://127.0.0.1:{proxy.port}/moto-api/reset", method="POST")
    urllib.request.urlopen(request).close()
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir(BUCKET)
    yield proxy
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.close()
    server.stop()


def upload(folder: Path, prefix: str) -> str:
    """Copy a file or folder into the bucket; return its address."""
    import s3fs

    s3fs.S3FileSystem().put(str(folder), f"{BUCKET}/{prefix}", recursive=folder.is_dir())
    return f"s3://{BUCKET}/{prefix}"
