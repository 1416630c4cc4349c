"""A local server that imitates Google Cloud Storage: slow, and faulty if asked.

    python tools/storage_server.py DIR --latency_ms=50 --megabytes_per_sec=500

Serves the folders in DIR as buckets. It prints its address; our programs read from it with
STORAGE_EMULATOR_HOST=ADDRESS FSSPEC_GCS_TOKEN=anon GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT=false (the
last keeps gcsfs from a gRPC service that is not there), TensorStore with TENSORSTORE_GCS_HTTP_URL.
It knows of the JSON API: metadata, listings, downloads, whole or of ranges, uploads,
copies, moves and deletions, and the condition that an object has a given generation.
"""

import argparse
import contextlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

PIECE = 1 << 16
PAGE = 1000  # entries of a listing
STALL = "stall"  # sends nothing for a long time
RESET = "reset"  # closes the connection in the middle of the answer
SHORT = "short"  # sends fewer bytes than were asked for, as if that were right


class StorageServer(ThreadingHTTPServer):
    """Serves the folders in `root` as buckets, on a free port of this machine.

    Args:
      latency: seconds before an answer begins.
      bytes_per_second: of all answers together.
      fault: called with the number of a download, from 0, and its path; returns an HTTP status,
        STALL, RESET or SHORT to misbehave, None to serve.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        root: str | Path,
        *,
        port: int = 0,
        latency: float = 0.0,
        bytes_per_second: float = float("inf"),
        fault: Callable[[int, str], int | str | None] = lambda number, path: None,
    ):
        super().__init__(("127.0.0.1", port), _Handler)
        self.root = Path(root)
        self.latency = latency
        self.fault = fault
        self.num_downloads = 0
        self.num_requests = 0
        self.num_bytes = 0
        self.stopping = threading.Event()
        self._seconds_per_byte = 1 / bytes_per_second
        self._free_at = 0.0  # when the line has sent everything so far
        self._lock = threading.Lock()
        self.generations = {}  # of what was written here; of files that were there, 1
        self._last_generation = 1
        self._writing = threading.Lock()
        self.uploads = []  # bucket, name, condition and bytes of those in several parts

    @property
    def address(self) -> str:
        """What STORAGE_EMULATOR_HOST is set to."""
        return f"http://127.0.0.1:{self.server_port}"

    @contextlib.contextmanager
    def running(self) -> Iterator["StorageServer"]:
        """Serves in a thread."""
        thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield self
        finally:
            self.stopping.set()
            self.shutdown()
            thread.join()
            self.server_close()

    def count_request(self) -> None:
        with self._lock:
            self.num_requests += 1

    def next_download(self) -> int:
        with self._lock:
            self.num_downloads += 1
            return self.num_downloads - 1

    def wait_for_line(self, num_bytes: int) -> None:
        """Returns when so many more bytes may have been sent."""
        with self._lock:
            self.num_bytes += num_bytes
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + num_bytes * self._seconds_per_byte
            pause = self._free_at - now
        if pause > 0.001:
            time.sleep(pause)

    def generation(self, path: Path) -> int:
        """Of an object; 0 if there is none."""
        return self.generations.get(path, 1) if path.is_file() else 0

    def write(self, path: Path, data: bytes | None, if_generation: str | None) -> bool:
        """Writes an object, or deletes it; False if it does not have the generation."""
        with self._writing:
            if if_generation not in (None, str(self.generation(path))):
                return False
            if data is None:
                path.unlink()
                return True
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            self._last_generation += 1
            self.generations[path] = self._last_generation
            self.num_bytes += len(data)
            return True

    def handle_error(self, request, client_address) -> None:
        """Clients that leave are nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        server = self.server
        server.count_request()
        time.sleep(server.latency)
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        found = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", parts.path)
        if not found:
            return self._send_json(404, {"error": {"code": 404, "message": "not here"}})
        bucket, name = found[1], unquote(found[2] or "")
        if not name:
            is_listing = parts.path.rstrip("/").endswith("/o")
            return self._send_json(200, self._listing(bucket, query) if is_listing else {})
        path = server.root / bucket / name
        if not path.is_file():
            return self._send_json(404, {"error": {"code": 404, "message": f"no {name}"}})
        if query.get("alt") != "media":
            return self._send_json(200, self._metadata(path, bucket, name))
        return self._send_media(path, server.fault(server.next_download(), f"{bucket}/{name}"))

    def do_POST(self) -> None:
        server = self.server
        server.count_request()
        time.sleep(server.latency)
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        condition = query.get("ifGenerationMatch")
        if found := re.fullmatch(r"/upload/(\d+)", parts.path):
            return self._continue_upload(int(found[1]), data)
        if found := re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", parts.path):
            bucket, name = found[1], query.get("name")
            if query["uploadType"] == "resumable":
                return self._begin_upload(bucket, query, data)
            if query["uploadType"] == "multipart":
                name, data = _parts(self.headers["Content-Type"], data)
        elif found := re.fullmatch(r"/storage/v1/b/([^/]+)/o/(.+)/moveTo/o/(.+)", parts.path):
            source = server.root / found[1] / unquote(found[2])
            data = source.read_bytes()
            server.write(source, None, None)
            bucket, name = found[1], unquote(found[3])
        elif found := re.fullmatch(
            r"/storage/v1/b/([^/]+)/o/(.+)/rewriteTo/b/([^/]+)/o/(.+)", parts.path
        ):
            data = (server.root / found[1] / unquote(found[2])).read_bytes()
            bucket, name = found[3], unquote(found[4])
        else:
            return self._send_json(404, {"error": {"code": 404, "message": "not here"}})
        path = server.root / bucket / name
        if not server.write(path, data, condition):
            return self._send_json(412, {"error": {"code": 412, "message": "another generation"}})
        answer = self._metadata(path, bucket, name)
        is_copy = "rewriteTo" in parts.path
        return self._send_json(200, {"done": True, "resource": answer} if is_copy else answer)

    def _begin_upload(self, bucket: str, query: dict[str, str], described: bytes) -> None:
        name = query.get("name") or json.loads(described)["name"]
        uploads = self.server.uploads
        number = len(uploads)
        uploads.append((bucket, name, query.get("ifGenerationMatch"), bytearray()))
        self.send_response(200)
        self.send_header("Location", f"{self.server.address}/upload/{number}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _continue_upload(self, number: int, part: bytes) -> None:
        server = self.server
        bucket, name, condition, data = server.uploads[number]
        data += part
        if self.headers.get("Content-Range", "").endswith("/*"):  # more follows
            self.send_response(308)
            self.send_header("Range", f"bytes=0-{len(data) - 1}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        path = server.root / bucket / name
        if not server.write(path, bytes(data), condition):
            return self._send_json(412, {"error": {"code": 412, "message": "another generation"}})
        return self._send_json(200, self._metadata(path, bucket, name))

    def do_DELETE(self) -> None:
        server = self.server
        server.count_request()
        time.sleep(server.latency)
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        found = re.fullmatch(r"/storage/v1/b/([^/]+)/o/(.+)", parts.path)
        path = server.root / found[1] / unquote(found[2])
        if not path.is_file():
            return self._send_json(404, {"error": {"code": 404, "message": "not here"}})
        if not server.write(path, None, query.get("ifGenerationMatch")):
            return self._send_json(412, {"error": {"code": 412, "message": "another generation"}})
        return self._send_json(204, None)

    def _metadata(self, path: Path, bucket: str, name: str) -> dict:
        stat = path.stat()
        updated = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(stat.st_mtime))
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(stat.st_size),
            "generation": str(self.server.generation(path)),
            "metageneration": "1",
            "updated": updated,
            "timeCreated": updated,
        }

    def _listing(self, bucket: str, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        root = self.server.root / bucket
        items, prefixes = {}, set()
        for path in root.rglob("*"):
            name = str(path.relative_to(root))
            if not name.startswith(prefix) or not path.is_file():
                continue
            inside, found, _ = name[len(prefix) :].partition(delimiter or "\0")
            if found:
                prefixes.add(prefix + inside + delimiter)
            else:
                items[name] = path
        first = int(query.get("pageToken", 0))
        names = sorted(items)[first : first + PAGE]
        listing = {
            "kind": "storage#objects",
            "items": [self._metadata(items[name], bucket, name) for name in names],
            "prefixes": sorted(prefixes),
        }
        more = first + PAGE < len(items)
        return listing | ({"nextPageToken": str(first + PAGE)} if more else {})

    def _send_media(self, path: Path, fault: int | str | None) -> None:
        if isinstance(fault, int):
            return self._send_json(fault, {"error": {"code": fault, "message": "on purpose"}})
        if fault == STALL:
            self.server.stopping.wait(60)
            self.close_connection = True
            return None
        size = path.stat().st_size
        start, end = 0, size
        if found := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = found.groups()
            start = int(first) if first else max(0, size - int(last))
            end = min(size, int(last) + 1) if first and last else size
        if fault == SHORT:
            end = start + (end - start) // 2
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("X-Goog-Generation", str(self.server.generation(path)))
        self.end_headers()
        if fault == RESET:
            end = start + (end - start) // 2
        with path.open("rb") as file:
            file.seek(start)
            while start < end:
                data = file.read(min(PIECE, end - start))
                self.server.wait_for_line(len(data))
                self.wfile.write(data)
                start += len(data)
        if fault == RESET:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        return None

    def _send_json(self, status: int, value: dict | None) -> None:
        data = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


def _parts(content_type: str, body: bytes) -> tuple[str, bytes]:
    """Name and data of an upload of two parts."""
    boundary = re.search(r'boundary="?([^";]+)', content_type)[1].encode()
    _, described, content, _ = re.split(rb"(?:\r?\n)?--" + re.escape(boundary), body, maxsplit=3)
    blank = re.compile(rb"\r?\n\r?\n")
    return json.loads(blank.split(described, 1)[1])["name"], blank.split(content, 1)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", help="each folder in it is a bucket")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency_ms", type=float, default=0.0)
    parser.add_argument("--megabytes_per_sec", type=float, default=float("inf"))
    args = parser.parse_args()
    server = StorageServer(
        args.root,
        port=args.port,
        latency=args.latency_ms / 1000,
        bytes_per_second=args.megabytes_per_sec * 1e6,
    )
    print(server.address, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
