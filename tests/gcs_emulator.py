"""A Google Cloud Storage of this machine for tests: what its clients use of the JSON API.

Objects with generations, preconditions (ifGenerationMatch, ifGenerationNotMatch), ranges, simple,
multipart and resumable uploads, listing with prefixes, delimiters and pages, copies; reading also
by the XML API. Faults can be injected.
"""

import base64
import contextlib
import hashlib
import http.server
import itertools
import json
import os
import random
import re
import threading
import urllib.parse

import google_crc32c

from lmim_jax.utils import buckets

PAGE = 1000  # objects of a page of a listing, as of the real one
VARIABLES = ("TENSORSTORE_GCS_HTTP_URL", "STORAGE_EMULATOR_HOST", "CLOUD_STORAGE_EMULATOR_ENDPOINT")


class Emulator:
    """A server with buckets that lives as long as a `with` block.

    Attributes:
      url: of the server.
      environment: the variables by which clients find it, which are also set in this process.
      objects: {bucket: {name: (content, generation)}}; tests may read and change it.
      busy: the share of requests that are answered with 503.
      cut: the share of uploads whose connection breaks in the middle; nothing is stored.
      forbidden: methods (GET, POST, PUT, DELETE) that are answered with 403.
      requests: of every request, its method and path.
    """

    def __init__(self, *buckets):
        self.objects = {bucket: {} for bucket in buckets}
        self.busy = 0.0
        self.cut = 0.0
        self.forbidden = set()
        self.requests = []
        self.mutex = threading.RLock()
        self.uploads = {}
        self.random = random.Random(0)
        self.generations = itertools.count(1_700_000_000_000_001)
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.emulator = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = dict.fromkeys(VARIABLES, self.url)
        # No search for credentials on a machine of Google
        self.environment |= {"NO_GCE_CHECK": "true", "GCE_METADATA_HOST": "127.0.0.1:1"}

    def __enter__(self):
        self._before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        buckets._store.cache_clear()  # with connections to another server
        buckets._file_system.cache_clear()
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        for name, value in self._before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

    def names(self, bucket, prefix=""):
        """The names of the objects of a bucket that begin with a prefix, sorted."""
        with self.mutex:
            return sorted(name for name in self.objects[bucket] if name.startswith(prefix))

    def read(self, bucket, name):
        """The content of an object."""
        return self.objects[bucket][name][0]

    def write(self, bucket, name, content):
        """Write an object; its generation, as of every write, is a new one."""
        with self.mutex:
            self.objects[bucket][name] = (bytes(content), next(self.generations))

    def delete(self, bucket, name):
        """Delete an object."""
        with self.mutex:
            del self.objects[bucket][name]


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Nothing: clients end without closing their connections."""


class _Reply(Exception):
    """Ends a request."""

    def __init__(self, status, body=b"", **headers):
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers = headers


def _error(status, reason):
    return _Reply(status, {"error": {"code": status, "message": reason}})


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self):
        emulator = self.server.emulator
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        emulator.requests.append((self.command, self.path))
        is_upload = "/upload/" in url.path and self.command in ("POST", "PUT")
        with emulator.mutex:
            is_cut = is_upload and emulator.random.random() < emulator.cut
            is_busy = emulator.random.random() < emulator.busy
        if is_cut:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            return
        body = self._body()
        try:
            if is_busy:
                raise _error(503, "try again")
            if self.command in emulator.forbidden:
                raise _error(403, "the account does not have the permission")
            with emulator.mutex:
                self._route(url.path, query, body)
            raise _error(404, "no such method")
        except _Reply as reply:
            self._send(reply)

    def _body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, reply):
        with contextlib.suppress(ConnectionError):
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body)

    def _route(self, path, query, body):
        quoted = path.strip("/").split("/")
        parts = [urllib.parse.unquote(part) for part in quoted]
        match parts:
            case ["upload", *_] if "upload_id" in query:
                self._resume(query["upload_id"], body)
            case ["upload", "storage", "v1", "b", bucket, "o"]:
                self._upload(self._bucket(bucket), bucket, query, body)
            case ["storage", "v1", "b", bucket]:
                self._bucket(bucket)
                raise _Reply(200, {"kind": "storage#bucket", "name": bucket, "id": bucket})
            case ["storage", "v1", "b", bucket, "o"]:
                self._list(self._bucket(bucket), bucket, query)
            case ["storage", "v1", "b", bucket, "o", name, "rewriteTo", "b", other, "o", new]:
                content, _ = self._object(self._bucket(bucket), name)
                resource = self._store(self._bucket(other), other, new, content, query)
                raise _Reply(200, {"kind": "storage#rewriteResponse", "done": True,
                                   "resource": resource})  # fmt: skip
            case [*_, "storage", "v1", "b", bucket, "o", name]:
                self._one(self._bucket(bucket), bucket, name, query)
            case [bucket, *name] if name and self.command in ("GET", "HEAD"):
                self._media(*self._object(self._bucket(bucket), "/".join(name)))

    def _bucket(self, bucket):
        try:
            return self.server.emulator.objects[bucket]
        except KeyError:
            raise _error(404, "The specified bucket does not exist.") from None

    def _object(self, objects, name):
        try:
            return objects[name]
        except KeyError:
            raise _error(404, f"No such object: {name}") from None

    def _check(self, objects, name, query):
        """Answer 412 or 304 where a precondition does not hold."""
        generation = objects.get(name, (b"", 0))[1]
        if int(query.get("ifGenerationMatch", generation)) != generation:
            raise _error(412, "conditionNotMet")
        if int(query.get("ifGenerationNotMatch", -1)) == generation:
            raise _Reply(304)

    def _one(self, objects, bucket, name, query):
        if self.command == "DELETE":
            self._object(objects, name)
            self._check(objects, name, query)
            del objects[name]
            raise _Reply(204)
        content, generation = self._object(objects, name)
        self._check(objects, name, query)
        if query.get("alt") == "media":
            self._media(content, generation)
        raise _Reply(200, _resource(bucket, name, content, generation))

    def _media(self, content, generation):
        headers = {
            "X-Goog-Generation": generation,
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
        }
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            raise _Reply(200, content, **headers)
        if asked[1]:
            start = int(asked[1])
            stop = min(int(asked[2]) + 1 if asked[2] else len(content), len(content))
        else:
            start = max(0, len(content) - int(asked[2]))
            stop = len(content)
        if start >= len(content):
            raise _Reply(416, **{"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        raise _Reply(206, content[start:stop], **headers)

    def _list(self, objects, bucket, query):
        prefix = query.get("prefix", "")
        delimiter = query.get("delimiter")
        after = query.get("pageToken", "")
        page = min(int(query.get("maxResults", PAGE)), PAGE)
        items = []
        prefixes = []
        last = ""
        for name in sorted(objects):
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if "endOffset" in query and name >= query["endOffset"]:
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
            group = prefix + head + delimiter if delimiter and found else ""
            if (group or name) <= after or (group and group in prefixes):
                continue
            if len(items) + len(prefixes) == page:
                reply = {"items": items, "prefixes": prefixes, "nextPageToken": last}
                raise _Reply(200, {"kind": "storage#objects", **reply})
            if group:
                prefixes.append(group)
            else:
                items.append(_resource(bucket, name, *objects[name]))
            last = group or name
        raise _Reply(200, {"kind": "storage#objects", "items": items, "prefixes": prefixes})

    def _store(self, objects, bucket, name, content, query):
        self._check(objects, name, query)
        self.server.emulator.write(bucket, name, content)
        return _resource(bucket, name, *objects[name])

    def _upload(self, objects, bucket, query, body):
        kind = query.get("uploadType", "media")
        if kind == "media":
            raise _Reply(200, self._store(objects, bucket, query["name"], body, query))
        if kind == "multipart":
            (boundary,) = re.findall(r'boundary="?([^";]+)"?', self.headers["Content-Type"])
            first, second = body.split(b"--" + boundary.encode())[1:3]
            description = json.loads(_part(first))
            name = query.get("name") or description["name"]
            raise _Reply(200, self._store(objects, bucket, name, _part(second), query))
        description = json.loads(body or b"{}")
        name = query.get("name") or description["name"]
        number = f"upload{len(self.server.emulator.uploads)}"
        self.server.emulator.uploads[number] = (bucket, name, query, bytearray())
        location = f"{self.server.emulator.url}/upload/storage/v1/b/{bucket}/o?upload_id={number}"
        raise _Reply(200, Location=location, **{"X-GUploader-UploadID": number})

    def _resume(self, number, body):
        """A piece of a resumable upload, or the question how much of it has arrived."""
        bucket, name, query, content = self.server.emulator.uploads[number]
        if self.command == "DELETE":
            raise _Reply(499)
        span = self.headers.get("Content-Range", f"bytes 0-{len(body) - 1}/{len(body)}")
        start, total = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", span).groups()
        if start is not None:
            del content[int(start) :]
            content += body
        if total == "*" or len(content) < int(total):
            arrived = {"Range": f"bytes=0-{len(content) - 1}"} if content else {}
            raise _Reply(308, **arrived)
        raise _Reply(200, self._store(self._bucket(bucket), bucket, name, content, query))


def _part(text):
    """The content of a part of a multipart body; its lines end in LF or CRLF."""
    head = re.match(rb"\r?\n(?:[^\r\n]+\r?\n)*\r?\n", text)
    content = text[head.end() :]
    return content.removesuffix(b"\n").removesuffix(b"\r")


def _resource(bucket, name, content, generation):
    """What the JSON API says about an object."""
    return {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/{generation}",
        "bucket": bucket,
        "name": name,
        "generation": str(generation),
        "metageneration": "1",
        "size": str(len(content)),
        "etag": str(generation),
        "contentType": "application/octet-stream",
        "storageClass": "STANDARD",
        "crc32c": base64.b64encode(google_crc32c.value(content).to_bytes(4, "big")).decode(),
        "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
        "timeCreated": "2026-01-01T00:00:00.000Z",
        "updated": "2026-01-01T00:00:00.000Z",
    }
