"""A local OpenAI-compatible server that misbehaves on purpose."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, finish="stop", **message):
    """The body of a good chat completion."""
    message = {"role": "assistant", "content": text, **message}
    return {"choices": [{"index": 0, "finish_reason": finish, "message": message}],
            "usage": {"completion_tokens": len(str(text))}}


class Misbehaving:
    """`behave(body, attempt)` answers each chat request, attempt = 0, 1, ... for the same prompt: a
    dict (sent as JSON), bytes (sent as they are), (status, headers, bytes), "hang", "drop" or
    "truncated". `requests` keeps (headers, body) of all, `asked` counts by prompt, `models` are
    listed."""

    def __init__(self, behave, models=("stand-in",)):
        self.behave, self.requests, self.asked = behave, [], Counter()
        self.lock, self.stop = threading.Lock(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                self.send(200, {}, json.dumps({"data": [{"id": m} for m in models]}).encode())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = str(body["messages"][-1]["content"])
                with outer.lock:
                    attempt = outer.asked[prompt]
                    outer.asked[prompt] += 1
                    outer.requests.append((dict(self.headers), body))
                answer = outer.behave(body, attempt)
                if isinstance(answer, dict):
                    answer = json.dumps(answer).encode()
                if isinstance(answer, bytes):
                    answer = (200, {}, answer)
                if answer == "hang":
                    outer.stop.wait(20)
                elif answer == "truncated":
                    self.send(200, {"Content-Length": "100000"}, b'{"choices": [')
                elif answer != "drop":
                    self.send(*answer)
                self.close_connection = True

            def send(self, status, headers, content):
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def handle(self):
                try:
                    super().handle()
                except OSError:
                    pass  # the client gave up

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.server.shutdown()
        self.server.server_close()
