"""Our engine beside llama.cpp: same model file, threads and tokens, in pairs run in turn.

    python benches/peers.py --bench PEER --gguf FILE --models DIR --json OUT

`README.md` beside this file says how to get PEER and llama-cpp-python. Each round runs ours and
one of llama.cpp's variants one after the other, and the other way round in the next round; a
ratio is taken within a pair, so what else happens on the machine hits both. A variant is a
number format of the file (requantised into DIR where it is not there) with flash attention off,
or on ("+fa").
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

try:
    import llama_cpp as ll
    import numpy as np
except ImportError as error:
    sys.exit(f"peers.py: {error}; pip install llama-cpp-python (benches/README.md has the flags)")

STEP_ROWS_MAX = 512
CONTEXT_MAX = 1024
PREFILL_ROWS = 512
PROMPT_ROWS = 30  # greedy paths from here on have no near tie for a while
DECODE_TOKENS = 128
VERIFY_ROWS = (1, 2, 4, 8, 16)
VERIFY_CONTEXTS = (32, 512)
VERIFY_REPEATS = 5
SETTLE_S = 0.02  # the other side's idle threads stop spinning

# Values of enums in ggml.h and llama.h: what the layers become, and the embedding (the LM head
# too), which stays Q8_0 beside quantised layers as in the default model's file.
Q8_0 = 8
FORMATS = {"Q4_0": (2, Q8_0), "Q4_1": (3, Q8_0), "Q8_0": (7, Q8_0), "F16": (1, 1), "BF16": (32, 30)}

TEXT = """The harbour lies behind two long walls of stone, and when the tide turns the boats swing
round on their chains all at once, as if somebody had called them. In the morning the men carry
nets, rope and boxes of ice along the quay; by noon there is nothing left but gulls, a dog, and
the smell of tar. An old pilot keeps a book of every ship that has come in since 1931: its name,
its captain, what it carried, and how deep it lay in the water. He says that numbers do not lie,
but that people who read them in a hurry do. """


class Ours:
    """The bench `peer` with its requests."""

    def __init__(self, bench, threads, tokens):
        command = [bench, "--serve", "--threads", str(threads)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        try:
            self.process = subprocess.Popen(command, text=True, **pipes)
        except OSError as error:
            sys.exit(f"peers.py: --bench {bench} can't be started: {error.strerror}")
        self.hello = self._answer()
        self.ask("tokens " + " ".join(map(str, tokens)))

    def ask(self, request):
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            sys.exit(f"peers.py: our side refuses `{request[:60]}`: {answer['error']}")
        return answer

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"peers.py: our side ended with code {self.process.wait()}")
        return json.loads(line)

    def run(self, case):
        answer = self.ask(case.request)
        return answer["ms"], answer["ids"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Theirs:
    """One file in llama.cpp, with or without flash attention."""

    def __init__(self, model, name, flash, tokens):
        params = ll.llama_context_default_params()
        params.n_ctx = CONTEXT_MAX
        params.n_batch = params.n_ubatch = STEP_ROWS_MAX
        params.flash_attn_type = int(flash)
        params.no_perf = True
        self.context = ll.llama_init_from_model(model, params)
        if not self.context:
            sys.exit(f"peers.py: llama.cpp makes no context for {name}")
        self.name = name + ("+fa" if flash else "")
        self.bytes = ll.llama_model_size(model)
        self.memory = ll.llama_get_memory(self.context)
        self.vocab_size = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
        self.tokens = tokens
        self.held = 0  # leading tokens whose K and V are there
        self.batch = ll.llama_batch_init(STEP_ROWS_MAX, 0, 1)

    def set_threads(self, threads):
        ll.llama_set_n_threads(self.context, threads, threads)

    def run(self, case):
        return getattr(self, "_" + case.what)(*case.numbers)

    def _fill(self, first, tokens, logits_from):
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = first + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i >= logits_from

    def _step(self):
        """Runs the batch; address of the last row's logits, which waits for them."""
        code = ll.llama_decode(self.context, self.batch)
        if code != 0:
            sys.exit(f"peers.py: llama_decode of {self.name} says {code}")
        logits = ll.llama_get_logits_ith(self.context, -1)
        return ctypes.cast(logits, ctypes.c_void_p).value

    def _choose(self, address):
        logits = (ctypes.c_float * self.vocab_size).from_address(address)
        return int(np.frombuffer(logits, np.float32).argmax())

    def _timed_step(self):
        start = time.perf_counter_ns()
        address = self._step()
        return (time.perf_counter_ns() - start) / 1e6, address

    def _prefill(self, rows):
        ll.llama_memory_clear(self.memory, False)
        self._fill(0, self.tokens[:rows], rows - 1)
        ms, address = self._timed_step()
        self.held = rows
        return [ms], [self._choose(address)]

    def _decode(self, prompt, count):
        [token] = self._prefill(prompt)[1]
        times, ids = [], []
        for position in range(prompt, prompt + count):
            start = time.perf_counter_ns()
            self._fill(position, [token], 0)
            token = self._choose(self._step())
            times.append((time.perf_counter_ns() - start) / 1e6)
            ids.append(token)
        return times, ids

    def _verify(self, rows, context, repeats):
        if self.held < context:
            self._prefill(context)
        self.held = context
        self._fill(context, self.tokens[context:context + rows], 0)
        times = []
        for _ in range(repeats + 1):
            ll.llama_memory_seq_rm(self.memory, 0, context, -1)
            ms, address = self._timed_step()
            times.append(ms)
        return times[1:], [self._choose(address)]  # the first only warms up


class Case:
    """What is run: `prefill ROWS`, `decode PROMPT COUNT` or `verify ROWS CONTEXT REPEATS`."""

    def __init__(self, what, *numbers):
        self.what, self.numbers = what, numbers
        self.request = " ".join([what, *map(str, numbers)])
        self.pairs = []  # {round, variant, ours_ms, theirs_ms, first}
        self.same_ids = {}

    def name(self):
        if self.what == "verify":
            return f"verify {self.numbers[0]} rows after {self.numbers[1]}"
        return f"{self.what} {self.numbers[-1]}"

    def number(self, times):
        """A run's figure in ms: the mean over its tokens, or the median of its repeats."""
        return statistics.mean(times) if self.what == "decode" else statistics.median(times)

    def pair(self, round_, ours, theirs):
        order = (ours, theirs) if round_ % 2 == 0 else (theirs, ours)
        results = {}
        for side in order:
            time.sleep(SETTLE_S)
            results[side] = side.run(self)
        (ours_ms, ours_ids), (theirs_ms, theirs_ids) = results[ours], results[theirs]
        both = zip(ours_ids, theirs_ids)
        same = next((i for i, (a, b) in enumerate(both) if a != b), len(ours_ids))
        self.same_ids[theirs.name] = f"{same}/{len(ours_ids)}"
        self.pairs.append({
            "round": round_, "variant": theirs.name,
            "first": "ours" if order[0] is ours else "theirs",
            "ours_ms": self.number(ours_ms), "theirs_ms": self.number(theirs_ms),
        })

    def ours(self):
        return [pair["ours_ms"] for pair in self.pairs]

    def of(self, variant, key):
        return [key(pair) for pair in self.pairs if pair["variant"] == variant]


def spread(values, digits=2):
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def other_cores(pids):
    """A meter: cores used by everything but `pids` since the last call. Linux only."""
    if not Path("/proc/stat").is_file():
        return lambda: float("nan")
    ticks_a_second = os.sysconf("SC_CLK_TCK")

    def read():
        cpu = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        busy = sum(cpu[:3]) + sum(cpu[5:7])
        for pid in pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            busy -= int(fields[11]) + int(fields[12])
        return time.monotonic(), busy / ticks_a_second

    last = [read()]

    def since():
        (then, before), now = last[0], read()
        last[0] = now
        return max(0.0, (now[1] - before) / max(now[0] - then, 1e-9))

    return since


def requantise(source, models, formats):
    """The files of each format; the source counts as the format in its name."""
    files = {}
    for name in formats:
        if f".{name}." in source.name:
            files[name] = source
            continue
        stem = source.name.removesuffix(".gguf").rsplit(".", 1)[0]
        files[name] = path = models / f"{stem}.{name}.gguf"
        if path.is_file():
            continue
        models.mkdir(parents=True, exist_ok=True)
        params = ll.llama_model_quantize_default_params()
        params.ftype, embedding = FORMATS[name]
        params.token_embedding_type = params.output_tensor_type = embedding
        params.allow_requantize = True
        part = path.with_suffix(".part")
        if ll.llama_model_quantize(os.fsencode(source), os.fsencode(part), params) != 0:
            sys.exit(f"peers.py: llama.cpp can't write {source.name} as {name}")
        part.rename(path)
    return files


def load(path):
    model = ll.llama_model_load_from_file(os.fsencode(path), ll.llama_model_default_params())
    return model or sys.exit(f"peers.py: llama.cpp can't open {path}")


def tokenise(model, count):
    text = TEXT.replace("\n", " ").encode()
    ids = (ll.llama_token * len(text))()
    vocab = ll.llama_model_get_vocab(model)
    got = ll.llama_tokenize(vocab, text, len(text), ids, len(text), False, False)
    if got <= 0:
        sys.exit("peers.py: llama.cpp can't tokenise the text")
    return [ids[i % got] for i in range(count)]


def cases_of(whats):
    cases = []
    if "prefill" in whats:
        cases.append(Case("prefill", PREFILL_ROWS))
    if "decode" in whats:
        cases.append(Case("decode", PROMPT_ROWS, DECODE_TOKENS))
    if "verify" in whats:
        cases += [
            Case("verify", rows, context, VERIFY_REPEATS)
            for context in VERIFY_CONTEXTS
            for rows in VERIFY_ROWS
        ]
    return cases


class Run:
    """All rounds at one thread count."""

    def __init__(self, args, threads, variants, tokens):
        self.threads, self.variants, self.cases = threads, variants, cases_of(args.what)
        self.limits, self.others, self.roles_ms = [], [], []
        self.ours = Ours(args.bench, threads, tokens)
        for variant in variants:
            variant.set_threads(threads)

    def rounds(self, count):
        warm_up = [Case("prefill", 64), Case("decode", 8, 4)]
        for case in warm_up:
            for variant in self.variants:
                case.pair(0, self.ours, variant)
        since = other_cores([os.getpid(), self.ours.process.pid])
        for round_ in range(count):
            self.limits.append(self.ours.ask("limits"))
            for case in self.cases:
                for variant in self.variants:
                    case.pair(round_, self.ours, variant)
                if case.what == "decode":
                    roles = self.ours.ask(case.request.replace("decode", "roles"))
                    self.roles_ms.append(statistics.mean(roles["ms"]))
            self.others.append(since())
            print(f"{self.threads} threads: round {round_ + 1} of {count}", file=sys.stderr)
        self.ours.close()

    def _share(self, size, times_by_round):
        """Percent of the round's read bandwidth that `size` bytes a token are."""
        bandwidth = [limits["read_bytes"] for limits in self.limits]
        return [100 * size / (bandwidth[round_] * ms / 1e3) for round_, ms in times_by_round]

    def _decode_share(self, case, variant):
        if case.what != "decode":
            return ""
        if variant is None:
            size = self.ours.hello["weights_bytes"]
            times = [(pair["round"], pair["ours_ms"]) for pair in case.pairs]
        else:
            size = variant.bytes
            times = case.of(variant.name, lambda pair: (pair["round"], pair["theirs_ms"]))
        return f"   {spread(self._share(size, times), 0)} % of bandwidth"

    def _cost(self, case, times):
        """A verify beside that of one row at the same context."""
        if case.what != "verify" or case.numbers[0] == 1:
            return ""
        like = (1, case.numbers[1])
        one = next(c for c in self.cases if c.what == "verify" and c.numbers[:2] == like)
        ratios = [a / b for a, b in zip(times(case), times(one))]
        return f"   {spread(ratios)} x one row"

    def table(self):
        bandwidth = [limits["read_bytes"] / 1e9 for limits in self.limits]
        print(f"\n== {self.threads} threads; read bandwidth {spread(bandwidth, 1)} GB/s; "
              f"other jobs used {spread(self.others)} cores")
        for case in self.cases:
            unit = "ms a token" if case.what == "decode" else "ms"
            print(f"{case.name()}, {self.threads} threads [{unit}]")
            print(f"  {'ours':<10} {spread(case.ours()):<28}{self._decode_share(case, None)}"
                  f"{self._cost(case, Case.ours)}")
            if case.what == "decode":
                print(f"  {'by roles':<10} {spread(self.roles_ms):<28}")
            for variant in self.variants:
                def times(case, variant=variant):
                    return case.of(variant.name, lambda pair: pair["theirs_ms"])
                ratios = case.of(variant.name, lambda pair: pair["theirs_ms"] / pair["ours_ms"])
                fastest = min(times(case)) / min(case.of(variant.name, lambda p: p["ours_ms"]))
                same = ""
                if case.what == "decode":
                    same = f"   first {case.same_ids[variant.name]} ids equal"
                print(f"  {variant.name:<10} {spread(times(case)):<28} {spread(ratios)} x ours, "
                      f"fastest/fastest {fastest:.2f}"
                      f"{self._decode_share(case, variant)}{self._cost(case, times)}{same}")

    def record(self):
        return {
            "threads": self.threads, "ours": self.ours.hello, "limits": self.limits,
            "other_cores": self.others, "roles_ms": self.roles_ms,
            "bytes": {variant.name: variant.bytes for variant in self.variants},
            "cases": [
                {
                    "what": case.name(), "request": case.request,
                    "pairs": case.pairs, "same_ids": case.same_ids,
                }
                for case in self.cases
            ],
        }


def arguments():
    def words(allowed):
        def parse(text):
            found = text.split(",")
            bad = [word for word in found if word not in allowed]
            if bad:
                raise argparse.ArgumentTypeError(f"{bad[0]!r} is none of {', '.join(allowed)}")
            return found
        return parse

    def count(text):
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is less than 1")
        return int(text)

    def numbers(text):
        return [count(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--bench", required=True, help="the built bench `peer`")
    parser.add_argument("--gguf", type=Path, required=True, help="the default model's file")
    parser.add_argument("--models", type=Path, required=True, help="for requantised copies")
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--rounds", type=count, default=7)
    for name, all_of_it in [
        ("what", ["prefill", "decode", "verify"]),
        ("formats", list(FORMATS)),
        ("flash", ["off", "on"]),
    ]:
        help_ = "some of " + ",".join(all_of_it)
        parser.add_argument(f"--{name}", type=words(all_of_it), default=all_of_it, help=help_)
    parser.add_argument("--json", type=Path, help="every pair, for later")
    return parser.parse_args()


def main():
    args = arguments()
    if not args.gguf.is_file():
        sys.exit(f"peers.py: {args.gguf} is not there; `hat-engine pull` fetches the default model")
    quiet = ll.llama_log_callback(lambda level, text, data: None)
    ll.llama_log_set(quiet, ctypes.c_void_p(0))
    ll.llama_backend_init()
    system = ll.llama_print_system_info().decode()
    print(f"llama-cpp-python {ll.__version__}: {system}")
    files = requantise(args.gguf, args.models, args.formats)
    models = {name: load(path) for name, path in files.items()}
    tokens = tokenise(next(iter(models.values())), CONTEXT_MAX)
    variants = [
        Theirs(model, name, flash == "on", tokens)
        for name, model in models.items()
        for flash in args.flash
    ]
    runs = []
    for threads in args.threads:
        run = Run(args, threads, variants, tokens)
        if not runs:
            hello = run.ours.hello
            print(f"ours: {hello['describe']}, {hello['weights_bytes']} bytes of weights")
        run.rounds(args.rounds)
        run.table()
        runs.append(run.record())
        if args.json:
            about = {"machine": platform.machine(), "llama_cpp_python": ll.__version__}
            about |= {"system": system, "runs": runs}
            args.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
