import base64
import hashlib
import hmac
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

SECRET = base64.b64decode(os.environ["WEBHOOK_SECRET"].removeprefix("whsec_") + "==")
TOLERANCE = 300  # seconds
seen = {}  # event id -> highest token; a table with a unique key in a real receiver
lock = Lock()


def is_signed(headers, body):
    event, timestamp = headers["webhook-id"] or "", headers["webhook-timestamp"] or ""
    if not timestamp.isdecimal() or abs(time.time() - int(timestamp)) > TOLERANCE:
        return False
    signed = f"{event}.{timestamp}.".encode() + body
    expected = b"v1," + base64.b64encode(hmac.new(SECRET, signed, hashlib.sha256).digest())
    given = (headers["webhook-signature"] or "").encode().split()
    return any(hmac.compare_digest(expected, signature) for signature in given)


def accept(event, token):
    with lock:
        known = seen.get(event)
        seen[event] = max(token, known or 0)
    if known is None:
        return "new"  # do what the event says, in the transaction that writes its id
    return "duplicate" if token > known else "late duplicate"


class Receiver(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"] or 0))
        if is_signed(self.headers, body):
            self.answer(200, accept(self.headers["webhook-id"], int(self.headers["webhook-lease-token"])))
        else:
            self.answer(401, "bad signature")

    def answer(self, status, text):
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Receiver).serve_forever()
