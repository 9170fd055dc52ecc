"""A server of slides on this machine: the GDC's list and /data/<id>, an S3 bucket with its listing,
plain files; byte ranges, and every fault that such a server can have."""

import contextlib
import json
import threading
import time
from collections import Counter
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Answering(BaseHTTPRequestHandler):
    """Replies, and keeps no log of requests."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, body, headers=(), length=None):
        self.send_response(status)
        for key, value in headers:
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)


class Slides(Answering):
    """`files`: content by id or file name; `faults`: what happens to the next requests for data.

    A fault is a status, or "norange", "cut", "stall", "short", "shift", "long", or an address to
    redirect to; one in `always` never ends, nor does that of a file in `harmed`. Where there is an
    `auth`, requests need that header. `sent`: bytes by file.
    """

    disable_nagle_algorithm = True

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        hits = []
        for key, (name, body) in self.server.files.items():
            hits.append(
                {
                    "file_id": key,
                    "file_name": name,
                    "file_size": len(body),
                    "md5sum": md5(body).hexdigest(),
                }
            )
        page = {"data": {"hits": hits, "pagination": {"total": len(hits)}}}
        self.reply(200, json.dumps(page).encode())

    def do_GET(self):
        server = self.server
        where = urlsplit(self.path)
        query = parse_qs(where.query)
        if "list-type" in query:
            return self.list_bucket(query["prefix"][0])
        key = unquote(where.path).rpartition("/")[2]
        server.seen.append((key, self.headers.get("Range"), dict(self.headers)))
        if server.auth and self.headers.get("Authorization") != server.auth:
            return self.reply(401, b"")
        if key not in server.files:
            return self.reply(404, b"")
        body = server.files[key][1]
        fault = (
            server.harmed.get(key)
            or server.always
            or (server.faults.pop(0) if server.faults else None)
        )
        if isinstance(fault, int):
            return self.reply(fault, b"", [("Retry-After", "0")])
        if isinstance(fault, str) and "://" in fault:
            return self.reply(302, b"", [("Location", fault + self.path)])
        if fault == "stall":
            time.sleep(server.stall)
        if fault == "norange" or not self.headers.get("Range"):
            server.sent[key] += len(body)
            return self.reply(200, body)
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part = body[first : last + 1]
        if fault == "shift":
            first += 1
        headers = [("Content-Range", f"bytes {first}-{last}/{len(body)}"), ("ETag", server.etag)]
        length = len(part)
        if fault == "short":
            part, length = part[:-1], length - 1
        if fault == "long":
            part, length = part + b"!", length + 1
        if fault == "cut":
            part = part[: len(part) // 2]
            self.close_connection = True
        server.sent[key] += len(part)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.reply(206, part, headers, length)

    def list_bucket(self, prefix):
        keys = "".join(
            f"<Contents><Key>{prefix}{key}</Key><Size>{len(body)}</Size></Contents>"
            for key, (_, body) in self.server.files.items()
        )
        text = (
            '<?xml version="1.0"?><ListBucketResult '
            'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>false</IsTruncated>'
            f"{keys}</ListBucketResult>"
        )
        self.reply(200, text.encode(), [("Content-Type", "application/xml")])


@contextlib.contextmanager
def serve(files):
    """A server of `files` ({id: (file name, bytes)}); its address is `.url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slides)
    server.files, server.faults, server.always, server.seen = dict(files), [], None, []
    server.etag, server.stall, server.harmed = '"one"', 1.0, {}
    server.auth, server.sent = "", Counter()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
