#!/usr/bin/env python3
"""A real browser asks a device: a page of an allowed origin gets its stream, a foreign one nothing.

Starts both roles over the default model and headless Chromium (installed where it is missing),
whose two pages come from this script under two made-up host names. Prints what each page saw, and
fails where that is not what docs/HTTP.md says.

    python3 .ci/browser.py target/debug/hat-engine
"""

import http.server
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request

PATIENCE = 120
ALLOWED, FOREIGN = "notes.example", "evil.example"

# Three requests: a stream with the key as a client library sends it; the same without a preflight,
# as a form could; and a plain read.
PAGE = """<!doctype html><title>page</title><script>
const url = "http://127.0.0.1:%(port)d";
const messages = [{role: "user", content: "Say hello."}];
const body = JSON.stringify({messages, max_tokens: 8, stream: true});
const ask = async (path, options) => {
  try {
    const reply = await fetch(url + path, options);
    return {status: reply.status, text: await reply.text()};
  } catch (error) {
    return {error: String(error)};
  }
};
(async () => {
  const seen = {
    stream: await ask("/v1/chat/completions", {method: "POST", body, headers: {
      "Content-Type": "application/json", "Authorization": "Bearer %(key)s"}}),
    form: await ask("/v1/chat/completions", {method: "POST", body, headers: {
      "Content-Type": "text/plain"}}),
    health: await ask("/health", {}),
  };
  await fetch("/seen", {method: "POST", body: JSON.stringify(seen)});
})();
</script>"""


def install_chromium():
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found:
        return found
    install = ["install", "-y", "--no-install-recommends", "chromium"]
    for command in (["update"], install):
        subprocess.run(["apt-get", *command], check=True, stdout=subprocess.DEVNULL)
    return shutil.which("chromium") or sys.exit("chromium: installed, and not found")


class Pages:
    """Serves the page, and takes what it saw."""

    def __init__(self, port, key):
        self.seen = queue.Queue()
        page, seen = (PAGE % {"port": port, "key": key}).encode(), self.seen

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(page)

            def do_POST(self):
                seen.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def visit(self, chromium, host):
        """What the page sees under this host name."""
        # Its processes may still write while they die.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            browser = subprocess.Popen(
                [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                 "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync",
                 "--disable-dev-shm-usage", f"--user-data-dir={profile}",
                 "--host-resolver-rules=MAP *.example 127.0.0.1",
                 "--remote-debugging-port=0", f"http://{host}:{self.port}/"],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
            try:
                return self.seen.get(timeout=PATIENCE)
            finally:
                os.killpg(browser.pid, signal.SIGKILL)
                browser.wait()


class Role:
    """A role of the engine, whose start lines are read."""

    def __init__(self, *command):
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            self.lines.put(line)

    def find(self, pattern):
        said = []
        while True:
            try:
                said.append(self.lines.get(timeout=PATIENCE))
            except queue.Empty:
                sys.exit(f"no {pattern!r} in what it says:\n{''.join(said)}")
            if found := re.search(pattern, said[-1]):
                return found[1]

    def stop(self):
        self.process.terminate()
        self.process.wait(PATIENCE)


def free_port():
    import socket
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def main():
    engine = sys.argv[1]
    chromium = install_chromium()
    subprocess.run([engine, "pull"], check=True, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as directory:
        key_file = os.path.join(directory, "key")
        key = "browser-stage-key"
        with open(os.open(key_file, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
            file.write(key + "\n")
        http_port, cloud_port = free_port(), free_port()
        pages = Pages(http_port, key)
        roles = []
        try:
            roles.append(Role(engine, "cloud", "--listen", f"127.0.0.1:{cloud_port}"))
            roles[0].find(f"(:{cloud_port})")
            roles.append(Role(engine, "device", "--cloud", f"127.0.0.1:{cloud_port}",
                              "--http", f"127.0.0.1:{http_port}", "--api-key-file", key_file,
                              "--allow-origin", f"http://{ALLOWED}:{pages.port}"))
            roles[1].find(f"(:{http_port})")
            seen = {host: pages.visit(chromium, host) for host in (ALLOWED, FOREIGN)}
            request = urllib.request.Request(f"http://127.0.0.1:{http_port}/metrics",
                                             headers={"Authorization": f"Bearer {key}"})
            metrics = urllib.request.urlopen(request).read().decode()
        finally:
            for role in reversed(roles):
                role.stop()
    for host, found in seen.items():
        said = {name: one.get("status", one.get("error")) for name, one in found.items()}
        print(f"{host}: {json.dumps(said)}")
    allowed, foreign = seen[ALLOWED], seen[FOREIGN]
    assert allowed["stream"].get("status") == 200, allowed
    assert allowed["stream"]["text"].rstrip().endswith("data: [DONE]"), allowed
    assert allowed["form"].get("status") in (400, 401, 415), allowed
    assert allowed["health"].get("status") == 200, allowed
    assert all("error" in one for one in foreign.values()), foreign
    rejected = re.search(r'hat_rejected_total\{reason="origin_not_allowed"\} (\d+)', metrics)
    assert rejected and int(rejected[1]) >= 1, metrics
    answered = re.search(r"hat_tokens_predicted_total (\d+)", metrics)
    assert answered and int(answered[1]) <= 8, "the foreign page was answered"
    print(f"{rejected[1]} refused for their origin; {answered[1]} tokens, all for {ALLOWED}")


if __name__ == "__main__":
    main()
