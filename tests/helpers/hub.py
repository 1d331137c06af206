"""A server that speaks the few calls of the Hugging Face hub which fetching a file takes."""

import contextlib
import hashlib
import http.server
import threading
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serving(root: Path):
    """``root``/organisation/repository/file under http://127.0.0.1:port; yields the address and what was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, code, headers, data=b"", body=True):
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def handle_request(self, body):
            asked.append(f"{self.command} {self.path}")
            parts = self.path.split("?")[0].strip("/").split("/")
            if len(parts) < 5 or parts[2] != "resolve":
                return self.answer(404, {}, body=body)
            if not (root / parts[0] / parts[1]).is_dir():
                return self.answer(404, {"X-Error-Code": "RepoNotFound"}, body=body)
            if parts[3] not in ("main", "v1"):
                return self.answer(404, {"X-Error-Code": "RevisionNotFound"}, body=body)
            file = root.joinpath(parts[0], parts[1], *parts[4:])
            if not file.is_file():
                return self.answer(404, {"X-Error-Code": "EntryNotFound"}, body=body)
            data = file.read_bytes()
            known = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            return self.answer(200, known, data, body)

        def do_HEAD(self):
            self.handle_request(False)

        def do_GET(self):
            self.handle_request(True)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
