# SPDX-License-Identifier: Apache-2.0
"""What a tensor in another process costs, against the CPU and plain sockets.

Both sides of a row run in turns in this run, on one thread each; a row shows the
ratio of the fastest repeats, and in its note the ratio of the medians. Where only
queueing is timed, the machine is waited for before each repeat, outside the clock.
The delayed rows go through a proxy that adds half of `RTT` each way.
"""

import contextlib
import gc
import io
import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from mycelya_torch import RemoteMachine

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.bench.peers import peer_process, proxy  # noqa: E402

RTT = 0.02
NEW = 32
MEGABYTE = 1 << 20
Job = Callable[[], object]


def rows() -> Iterable[dict]:
    """Yield all rows; about six minutes."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with RemoteMachine("local") as machine:
        device = machine.device()
        yield from queueing(machine, device)
        yield from unknown(machine, device)
        yield from reading(machine, device)
        yield from training(machine, device)
        yield from generating(machine, device)
        yield from moving(machine, device)
        yield from holding(machine, device)
    yield cold()
    yield from delayed()
    yield serialising()
    yield importing()
    yield from same_numbers()


class Turns:
    """Seconds of two jobs that ran in turns."""

    def __init__(
        self,
        ours: Job,
        peer: Job,
        *,
        settle: Job = lambda: None,
        repeats: int = 9,
        calls: int = 1,
        warmup: int = 2,
    ) -> None:
        self.ours: list[float] = []
        self.peer: list[float] = []
        sides = [(self.ours, ours), (self.peer, peer)]
        gc.collect()
        gc.disable()
        try:
            for number in range(-warmup, repeats):
                for times, job in sides if number % 2 else sides[::-1]:
                    settle()
                    begin = time.perf_counter()
                    for _ in range(calls):
                        job()
                    seconds = (time.perf_counter() - begin) / calls
                    if number >= 0:
                        times.append(seconds)
        finally:
            gc.enable()

    @property
    def ratio(self) -> float:
        """Fastest of ours over the fastest of the peer's."""
        return min(self.ours) / min(self.peer)

    def note(self, unit: str = "us") -> str:
        """Both times, and the ratio of the medians."""
        scale = {"us": 1e6, "ms": 1e3}[unit]
        ours, peer = min(self.ours) * scale, min(self.peer) * scale
        medians = statistics.median(self.ours) / statistics.median(self.peer)
        return f"{ours:.3g} {unit} against {peer:.3g}; medians {medians:.2f}"

    def row(self, measure: str, peer: str, goal: str, unit: str = "us") -> dict:
        """Return the row that says how many times the peer's time this takes."""
        return _row(measure, self.ratio, "x time", peer, goal, self.note(unit))

    def rate(self, measure: str, peer: str, goal: str, unit: str = "ms") -> dict:
        """Return the row that says what share of the peer's rate this reaches."""
        return _row(measure, 1 / self.ratio, "x rate", peer, goal, self.note(unit))


def _row(
    measure: str, value: object, unit: str, peer: str, goal: str, note: str = ""
) -> dict:
    names = ("measure", "value", "unit", "peer", "goal", "note")
    return dict(zip(names, (measure, value, unit, peer, goal, note), strict=True))


def queueing(machine: RemoteMachine, device: torch.device) -> Iterable[dict]:
    """What an operation costs this process, and 20,000 of them altogether."""
    x, w, b = torch.randn(8, 8), torch.randn(8, 8), torch.randn(8)
    y, v, c = (t.to(device) for t in (x, w, b))
    linear = nn.functional.linear
    for name, goal, ours, peer in (
        ("add", "<= 0.9", lambda: y + v, lambda: x + w),
        ("mm", "<= 0.8", lambda: y @ v, lambda: x @ w),
        ("linear", "<= 0.8", lambda: linear(y, v, c), lambda: linear(x, w, b)),
    ):
        found = Turns(ours, peer, settle=machine.synchronize, calls=1000, repeats=15)
        yield found.row(f"queue {name}, 8 x 8, known", f"{name} on the CPU", goal)
    found = Turns(lambda: y[1:3], lambda: x[1:3], calls=1000, repeats=15)
    yield found.row("view x[1:3]", "the view on the CPU", "<= 1.0")

    def many(tensor: Tensor) -> None:
        for _ in range(20_000):
            tensor + tensor
        if tensor is y:
            machine.synchronize()

    found = Turns(lambda: many(y), lambda: many(x), settle=machine.synchronize)
    yield found.row("20,000 adds, waited for", "the CPU", "<= 1.25", "ms")


def unknown(machine: RemoteMachine, device: torch.device) -> Iterable[dict]:
    """What an operation costs whose signature is new: another size each time."""
    big = torch.zeros(400, 400).to(device)
    sizes = iter(range(1, 400 * 400))

    def views() -> list[Tensor]:
        some = (divmod(next(sizes), 400) for _ in range(200))
        return [big[: i + 1, : j + 1] for i, j in some]

    def adds(tensors: list[Tensor]) -> int:
        for tensor in tensors:
            tensor + tensor
        return len(tensors)

    first, again = _twice(machine, views, adds)
    yield _unknown("add", first, again, "<= 4, <= 5 us")
    model = llama().to(device)
    layer, rotary = model.model.layers[0], model.model.rotary_emb
    lengths = iter(range(17, 250, 3))

    def state() -> tuple[Tensor, tuple[Tensor, Tensor]]:
        length = next(lengths)
        hidden = torch.zeros(1, length, model.config.hidden_size).to(device)
        return hidden, rotary(hidden, torch.arange(length)[None].to(device))

    def block(given: tuple[Tensor, tuple[Tensor, Tensor]]) -> int:
        before = machine.stats().ops
        layer(given[0], position_embeddings=given[1])
        return machine.stats().ops - before

    with torch.no_grad():
        first, again = _twice(machine, state, block)
    yield _unknown("mean of a Llama layer", first, again, "<= 6, <= 10 us")


def _twice(
    machine: RemoteMachine, make: Callable, run: Callable
) -> tuple[float, float]:
    """Fastest seconds for each operation of the first run, and of the second."""
    first, again = [], []
    for _ in range(15):
        given = make()
        for times in (first, again):
            machine.synchronize()
            begin = time.perf_counter()
            count = run(given)
            times.append((time.perf_counter() - begin) / count)
    return min(first), min(again)


def _unknown(name: str, first: float, again: float, goal: str) -> dict:
    note = f"{first * 1e6:.2f} us against {again * 1e6:.2f}"
    measure = f"queue with an unknown signature: {name}"
    return _row(measure, first / again, "x time", "known signature", goal, note)


def reading(machine: RemoteMachine, device: torch.device) -> Iterable[dict]:
    """What waiting for one value costs, in time and in bytes."""
    y = torch.randn(8, 8).to(device)
    with peer_process("echo") as sock:

        def ping() -> None:
            sock.sendall(bytes(40))
            sock.recv(40)

        found = Turns(lambda: y.sum().item(), ping, calls=100, repeats=15)
    best, base = min(found.ours) * 1e6, min(found.peer) * 1e6
    goal = f"<= 1.3 x peer + 5 = {1.3 * base + 5:.1f}"
    peer = f"40 bytes there and back between two processes, {base:.1f} us"
    medians = statistics.median(found.ours) * 1e6, statistics.median(found.peer) * 1e6
    note = "medians {:.1f} and {:.1f} us".format(*medians)
    yield _row("x.sum().item()", best, "us", peer, goal, note)
    large = torch.zeros(MEGABYTE).to(device)
    large[4].item()
    machine.reset_stats()
    large[5].item()
    stats = machine.stats()
    count = stats.bytes_sent + stats.bytes_received - large.element_size()
    note = f"{stats.bytes_sent} sent, {stats.bytes_received} received"
    measure = "t[5].item() of a 4 MB tensor, beyond the value"
    yield _row(measure, count, "bytes", "", "<= 256", note)


class Trainer:
    """An MLP (784-128-10) under Adam, batch 128; the same wherever it runs."""

    def __init__(self, device: torch.device | str, upload: bool = True) -> None:
        torch.manual_seed(0)
        self.images, self.labels = torch.randn(128, 784), torch.randint(0, 10, (128,))
        layers = nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)
        self.model = nn.Sequential(*layers).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.device = device
        if not upload:
            self.images, self.labels = self.images.to(device), self.labels.to(device)

    def run(self, steps: int) -> float:
        """Do some steps, and return the last loss."""
        for _ in range(steps):
            images, labels = self.images.to(self.device), self.labels.to(self.device)
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(images), labels)
            loss.backward()
            self.optimizer.step()
        return loss.item()


def training(machine: RemoteMachine, device: torch.device) -> Iterable[dict]:
    """A training step, its messages, and whether the loss is the CPU's."""
    ours, peer = Trainer(device), Trainer("cpu")
    equal = sum(ours.run(1) == peer.run(1) for _ in range(50))
    goal = "50, bit for bit"
    yield _row("Adam on an MLP, equal losses in 50 steps", equal, "", "the CPU", goal)
    for upload, what in ((True, "batch sent each time"), (False, "batch on it")):
        ours, peer = Trainer(device, upload), Trainer("cpu")
        found = Turns(lambda a=ours: a.run(40), lambda b=peer: b.run(40))
        measure = f"40 Adam steps of an MLP, {what}, loss read"
        yield found.row(measure, "the CPU", "<= 0.9", "ms")
    machine.reset_stats()
    ours.run(100)
    yield _per_frame(machine, "training", ">= 100")


def _per_frame(machine: RemoteMachine, what: str, goal: str) -> dict:
    stats = machine.stats()
    note = f"{stats.ops:,} operations in {stats.frames_sent:,} frames"
    value, peer = stats.ops / stats.frames_sent, "one message for each operation"
    return _row(f"operations in a frame, {what}", value, "", peer, goal, note)


def llama() -> nn.Module:
    """A Llama of 4 layers, width 128, 1,024 tokens, with random weights."""
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def generate(model: nn.Module, ids: Tensor) -> Tensor:
    """Add `NEW` tokens, greedily, and read them."""
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, **options).cpu()


def generating(machine: RemoteMachine, device: torch.device) -> Iterable[dict]:
    """Tokens a second, and what one token sends."""
    peer, ids = llama(), torch.arange(16)[None]
    ours, there = llama().to(device), ids.to(device)
    generate(ours, there)
    machine.reset_stats()
    same = torch.equal(generate(ours, there), generate(peer, ids))
    stats = machine.stats()
    what, cpu = f"Llama of 4 layers, {NEW} tokens", "generate on the CPU"
    yield _row(f"{what}: tokens equal", same, "", cpu, "True")
    trips = stats.round_trips / NEW
    yield _row(f"{what}: round trips", trips, "a token", "", "<= 1.1")
    yield _row(f"{what}: sent", stats.bytes_sent / NEW, "bytes a token", "", "<= 4,096")
    yield _per_frame(machine, "generation", ">= 40")
    found = Turns(lambda: generate(ours, there), lambda: generate(peer, ids))
    yield found.rate(f"{what}, known signatures", cpu, ">= 1.2")


def cold() -> dict:
    """The first generation on a machine, each time on a new one."""
    peer, ids = llama(), torch.arange(16)[None]
    ours, theirs = [], []
    for number in range(8):
        with RemoteMachine("local") as machine:
            model, there = llama().to(machine.device()), ids.to(machine.device())
            machine.synchronize()
            for times, job in (
                (ours, lambda m=model, t=there: generate(m, t)),
                (theirs, lambda: generate(peer, ids)),
            ):
                begin = time.perf_counter()
                job()
                # The first also loads Python modules that generate needs.
                times.extend([time.perf_counter() - begin][: number > 0])
    note = f"{min(ours) * 1e3:.3g} ms against {min(theirs) * 1e3:.3g}"
    measure = f"Llama of 4 layers, {NEW} tokens, new machine"
    ratio = min(theirs) / min(ours)
    return _row(measure, ratio, "x rate", "generate on the CPU", ">= 0.9", note)


def moving(machine: RemoteMachine, device: torch.device) -> Iterable[dict]:
    """256 MB each way, into memory that is there on both sides."""
    here = torch.ones(64 * MEGABYTE)
    there = here.to(device)
    view = memoryview(here.numpy()).cast("B")

    def upload() -> None:
        there.copy_(here)
        machine.synchronize()

    with peer_process("buffer", str(len(view))) as sock:

        def send() -> None:
            sock.sendall(b"u")
            sock.sendall(view)
            sock.recv(1)

        def receive() -> None:
            sock.sendall(b"d")
            done = 0
            while done < len(view):
                done += sock.recv_into(view[done:])

        peer = "socketpair between two processes"
        found = Turns(upload, send, repeats=7)
        yield found.rate("upload 256 MB", peer, ">= 0.85")
        found = Turns(lambda: here.copy_(there), receive, repeats=7)
        yield found.rate("download 256 MB", peer, ">= 0.85")


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def holding(machine: RemoteMachine, device: torch.device) -> Iterable[dict]:
    """Memory of this process for what lives on the machine."""
    machine.synchronize()
    before = resident()
    held = [torch.ones(64 * MEGABYTE, device=device) for _ in range(8)]
    machine.synchronize()
    grown = (resident() - before) / MEGABYTE
    yield _row("growth of this process with 2 GB there", grown, "MiB", "", "<= 20")
    held.clear()
    machine.synchronize()
    count, sizes = 100_000, {}
    for place in (device, "cpu"):
        before = resident()
        tensors: list[Tensor] = []
        tensors.extend(torch.empty(4, device=place) for _ in range(count))
        machine.synchronize()
        sizes[place] = (resident() - before) / count
        tensors.clear()
    peer = f"{sizes['cpu']:.0f} bytes on the CPU"
    measure = f"memory for each of {count:,} live tensors"
    yield _row(measure, sizes[device], "bytes", peer, "<= 600")


def delayed() -> Iterable[dict]:
    """Training and generation through a proxy, with and without a delay."""
    with server() as (port, token), proxy(port, 0.0) as near, proxy(port, RTT) as far:
        options = {"token": token}
        with (
            RemoteMachine("tcp", address=f"127.0.0.1:{near}", **options) as close,
            RemoteMachine("tcp", address=f"127.0.0.1:{far}", **options) as away,
        ):
            trainers = [Trainer(m.device(), upload=False) for m in (away, close)]
            jobs = [lambda t=t: t.run(100) for t in trainers]
            found = Turns(*jobs, repeats=7)
            value = (min(found.ours) - 2 * RTT) / min(found.peer)
            ms = f"{RTT * 1e3:.0f} ms"
            measure = f"100 Adam steps at {ms} a round trip, less two of them"
            peer = "through the same proxy, no delay"
            yield _row(measure, value, "x time", peer, "<= 1.05", found.note("ms"))
            small = [torch.ones(1).to(m.device()) for m in (away, close)]
            found = Turns(*[lambda t=t: t.item() for t in small], repeats=15)
            trip = min(found.ours) - min(found.peer)
            ids = torch.arange(16)[None]
            jobs = []
            for machine in (away, close):
                model, there = llama().to(machine.device()), ids.to(machine.device())
                jobs.append(lambda m=model, t=there: generate(m, t))
            found = Turns(*jobs, repeats=7)
            value = (min(found.ours) - min(found.peer)) / NEW / trip
            measure = f"Llama at {ms} a round trip: more time for each token"
            yield _row(measure, value, "round trips", peer, "<= 1.1", found.note("ms"))


def serialising() -> dict:
    """Raw bytes against torch.save and torch.load, in one process."""
    tensor = torch.randn(16 * MEGABYTE)
    with RemoteMachine("mock") as machine:
        device = machine.device()

        def ours() -> None:
            tensor.to(device)
            machine.synchronize()

        def peer() -> None:
            buffer = io.BytesIO()
            torch.save(tensor, buffer)
            buffer.seek(0)
            torch.load(buffer)

        found = Turns(ours, peer)
    name = "torch.save and torch.load through memory"
    return found.rate("64 MB to a worker in this process", name, ">= 2")


def importing() -> dict:
    """What the import adds to `import torch`."""
    code = (
        "import time, torch; begin = time.perf_counter(); import mycelya_torch; "
        "print(time.perf_counter() - begin)"
    )
    command = [sys.executable, "-c", code]
    found = [float(subprocess.check_output(command)) * 1e3 for _ in range(7)]
    note = f"median {statistics.median(found):.1f}"
    return _row("import after torch", min(found), "ms", "", "<= 60", note)


def same_numbers() -> Iterable[dict]:
    """PyTorch's OpInfo database, by the sweep that the package's tests use."""
    sys.path.insert(0, str(ROOT / "packages/mycelya-torch/tests"))
    import opinfo_sweep as sweep

    entries = sweep.entries()
    sweeper = sweep.Sweep(lambda: RemoteMachine("local"))
    for name, mode in sweep.MODES.items():
        found = Counter(sweeper.run(op, mode).outcome for op in entries)
        counts = {key: found[key] for key in sweep.OUTCOMES if found[key]}
        counts.pop("none", None)
        left_out = counts.pop("out of scope", 0)
        wrong = found["differs"] + found["crash"]
        share = 100 * (1 - wrong / max(sum(counts.values()), 1))
        note = ", ".join(f"{count} {key}" for key, count in counts.items())
        note += f"; {left_out} of other layouts left out" if left_out else ""
        goal = "100" if name == "float32" else ">= 99.5"
        row = _row(f"OpInfo, {name}", share, "% as the CPU", "the CPU", goal, note)
        yield row | {"table": "mycelya-torch-opinfo"}
    sweeper.machine.stop()


@contextlib.contextmanager
def server() -> Iterator[tuple[int, str]]:
    """Start the package's server; yields its port and token."""
    token = secrets.token_hex(32)
    env = os.environ | {"MYCELYA_TOKEN": token, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mycelya_torch.server", "--device", "cpu"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            ready = json.loads(process.stdout.readline())
            yield int(ready["address"].rpartition(":")[2]), token
        finally:
            process.terminate()
