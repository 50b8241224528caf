"""The split beside its rival: the whole model on the far side of the same link, as a text stream.

    python3 benches/cloud_only.py --programs target/release [--bundle DIR] [--rtt-ms 40] [--pairs 8]

`--programs` has hat-engine and hat-link. The split has its cloud behind hat-link and its client
beside the device. *Cloud-only* has device and cloud behind hat-link and the client in front of
it: prompt and answer cross as HTTP, rows do not. Both are the same programs with the same flags,
so drafts help both. Each pair asks both the same, one right after the other, each first in its
turn, and both must give the same text. What other work on the machine takes hits both halves of
a pair: read the ratios, and the bytes.
"""

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPTS = (
    "Write a short story about a lighthouse keeper.",
    "Explain to a child why the moon changes its shape.",
    "List five things to check before a long bicycle tour, each with one sentence.",
    "Summarise in three sentences what a library does for a small town.",
    "Write a polite letter to a neighbour who plays music at night.",
    "What is the difference between weather and climate?",
    "Describe how bread is made, step by step.",
    "Give me three reasons to learn a second language.",
)
PROGRAMS = []


def start(command, says, environment):
    """A program, and what follows `says` in the line that says it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    program = subprocess.Popen(command, text=True, env=environment, **pipes)
    PROGRAMS.append(program)
    said = []
    for line in program.stdout:
        said.append(line)
        if says in line:
            return line.split(says, 1)[1].split()[0].rstrip(",;")
    sys.exit(f"cloud_only.py: {command[0]} did not start:\n{''.join(said)}")


def ask(address, prompt, tokens):
    """Text, TTFT and ms a token of one streamed answer, and the bytes of its HTTP both ways."""
    host, port = address.rsplit(":", 1)
    connection = http.client.HTTPConnection(host, int(port), timeout=120)
    connection.connect()  # not part of TTFT: a client keeps its connection
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "stream": True}
    body = json.dumps(body)
    began = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        sys.exit(f"cloud_only.py: {answer.status} {answer.read().decode()}")
    text, first, last, received = "", None, began, 0
    for line in answer:
        received += len(line)
        if not line.startswith(b"data: {"):
            continue
        choices = json.loads(line[6:])["choices"]
        piece = choices[0]["delta"].get("content") if choices else None
        if piece:
            text, last = text + piece, time.perf_counter()
            first = first or last
    connection.close()
    ttft = (first or last) - began
    return text, 1e3 * ttft, 1e3 * (last - began - ttft) / max(tokens - 1, 1), len(body), received


def sent(address):
    """Bytes of rows and frames up and down that a device counts."""
    host, port = address.rsplit(":", 1)
    connection = http.client.HTTPConnection(host, int(port), timeout=120)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return [float(values[f"hat_bytes_{way}_total"]) for way in ("up", "down")]


def serve(args, state):
    """Starts all programs; the addresses of both HTTP servers as their clients see them."""
    environment = {"HAT_STATE_DIR": state, "XDG_STATE_HOME": state}
    environment |= {key: value for key, value in os.environ.items()
                    if not key.startswith("HAT_") or key == "HAT_CACHE_DIR"}
    engine, link = args.programs / "hat-engine", args.programs / "hat-link"
    halves = {half: ["--bundle", str(args.bundle / half)] if args.bundle else []
              for half in ("device", "cloud")}
    threads = ["--threads", "1"]
    cloud = start([engine, "cloud", "--listen", "127.0.0.1:0", *threads, *halves["cloud"]],
                  "listening at ", environment)
    rate = ["--up-mbit", str(args.up_mbit), "--down-mbit", str(args.down_mbit),
            "--rtt-ms", str(args.rtt_ms)]
    relay = lambda to: start([link, "--listen", "127.0.0.1:0", "--to", to, *rate],
                             "hat-link: ", environment)
    device = lambda to: start(
        [engine, "device", "--cloud", to, "--http", "127.0.0.1:0", "--no-api-key",
         "--prefix", "off", *threads, *halves["device"]], "listening at http://", environment)
    return device(relay(cloud)), relay(device(cloud))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--programs", required=True, type=Path)
    parser.add_argument("--bundle", type=Path, help="has device/ and cloud/; the default model without")
    parser.add_argument("--rtt-ms", type=float, default=40)
    parser.add_argument("--up-mbit", type=float, default=60)
    parser.add_argument("--down-mbit", type=float, default=100)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as state:
        try:
            compare(args, *serve(args, state))
        finally:
            for program in PROGRAMS:
                program.kill()
                program.wait()


def compare(args, split, rival):
    names = ("split", "cloud-only")
    addresses = dict(zip(names, (split, rival)))
    for name in names:
        ask(addresses[name], "Hello", 4)  # the first answer pays for pages that nobody read yet
    runs = {name: [] for name in names}
    rows_before = sent(split)
    for pair in range(args.pairs):
        prompt = PROMPTS[pair % len(PROMPTS)]
        for name in names if pair % 2 == 0 else reversed(names):
            runs[name].append(ask(addresses[name], prompt, args.tokens))
        if runs["split"][-1][0] != runs["cloud-only"][-1][0]:
            sys.exit(f"cloud_only.py: two texts for {prompt!r}")
    rows = [(now - then) / args.pairs for now, then in zip(sent(split), rows_before)]
    http_bytes = [statistics.mean(run[at] for run in runs["cloud-only"]) for at in (3, 4)]
    print(f"{args.up_mbit:g}/{args.down_mbit:g} Mbit/s, {args.rtt_ms:g} ms; {args.pairs} pairs of "
          f"{args.tokens} tokens, the same text in each; median (least - most)\n")
    print("| | TTFT, ms | a token, ms | bytes up / down an answer |\n|---|---|---|---|")
    spread = lambda values, form: (f"{statistics.median(values):{form}} "
                                   f"({min(values):{form}} - {max(values):{form}})")
    for name, (up, down) in zip(names, (rows, http_bytes)):
        ttft, token = ([run[at] for run in runs[name]] for at in (1, 2))
        print(f"| {name} | {spread(ttft, '.0f')} | {spread(token, '.1f')} | {up:,.0f} / {down:,.0f} |")
    ratios = [[one[at] / other[at] for one, other in zip(*runs.values())] for at in (1, 2)]
    print(f"| split / cloud-only, in pairs | {' | '.join(spread(r, '.2f') for r in ratios)} | |")


if __name__ == "__main__":
    main()
