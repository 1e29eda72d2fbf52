"""A bucket of made-up Google storage: its HTTP interface, and its file system.

Both see one dictionary of objects. Orbax's arrays come over HTTP, all else through the
file system; neither has folders, renames or locks.
"""

import contextlib
import http.server
import io
import json
import os
import threading
import urllib.parse

import fsspec

OBJECTS: dict[str, bytes] = {}
"""Content by bucket and name, ``"bucket/a/b"``."""


class _Written(io.BytesIO):
    """An object that is there once it is closed."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def close(self):
        if not self.closed:
            OBJECTS[self.name] = self.getvalue()
        super().close()


class Files(fsspec.AbstractFileSystem):
    """The objects as ``gcsfs`` shows them."""

    protocol = ("gs", "gcs")
    cachable = False

    def ls(self, path, detail=True, **options):
        path = self._strip_protocol(path).rstrip("/")
        if path in OBJECTS:
            found = {path: {"type": "file", "size": len(OBJECTS[path])}}
        else:
            found = {}
            for name, content in OBJECTS.items():
                if name.startswith(f"{path}/"):
                    rest = name[len(path) + 1 :].split("/")
                    child = f"{path}/{rest[0]}"
                    kind = "file" if len(rest) == 1 else "directory"
                    size = len(content) if kind == "file" else 0
                    found[child] = {"type": kind, "size": size}
        if not found:
            raise FileNotFoundError(path)
        entries = [{"name": name, **entry} for name, entry in sorted(found.items())]
        return entries if detail else [entry["name"] for entry in entries]

    def _open(self, path, mode="rb", **options):
        path = self._strip_protocol(path)
        if "r" in mode:
            if path not in OBJECTS:
                raise FileNotFoundError(path)
            return io.BytesIO(OBJECTS[path])
        return _Written(path)

    def _rm(self, path):
        OBJECTS.pop(self._strip_protocol(path), None)

    def mkdir(self, path, create_parents=True, **options):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def rename(self, *names, **options):
        raise AssertionError("a bucket has no renames")


class _Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def _name(self):
        parts = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(parts.query))
        bucket, _, name = parts.path.partition("/b/")[2].partition("/o")
        name = query.get("name") or urllib.parse.unquote(name.lstrip("/"))
        return f"{bucket}/{name}", query

    def _answer(self, code, content=b"", **headers):
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def _meta(self, name):
        found = {"name": name.partition("/")[2], "generation": "1"}
        return {**found, "size": str(len(OBJECTS[name]))}

    def do_GET(self):
        name, query = self._name()
        if name.endswith("/"):
            prefix = name + query.get("prefix", "")
            items = [self._meta(x) for x in sorted(OBJECTS) if x.startswith(prefix)]
            self._answer(200, json.dumps({"items": items}).encode())
        elif name not in OBJECTS:
            self._answer(404)
        elif query.get("alt") == "media":
            content = OBJECTS[name]
            code, more = 200, {}
            if wanted := self.headers.get("Range"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                stop = int(last) + 1 if last else len(content)
                code, total = 206, len(content)
                content = content[int(first) : stop]
                more = {"Content_Range": f"bytes {first}-{stop - 1}/{total}"}
            self._answer(code, content, x_goog_generation="1", **more)
        else:
            self._answer(200, json.dumps(self._meta(name)).encode())

    def do_POST(self):
        name, _ = self._name()
        OBJECTS[name] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, json.dumps(self._meta(name)).encode())

    def do_DELETE(self):
        name, _ = self._name()
        self._answer(204 if OBJECTS.pop(name, None) is not None else 404)


@contextlib.contextmanager
def served():
    """A bucket that Orbax and ``etils.epath`` take for Google's."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    for name in Files.protocol:
        fsspec.register_implementation(name, Files, clobber=True)
    os.environ["TENSORSTORE_GCS_HTTP_URL"] = url
    os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "none"
    try:
        yield OBJECTS
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        OBJECTS.clear()
