"""Whether a module, its state_dict, its pickled file and its saved folder are packed alike, for many architectures.

    python bench/agreement.py                     # all architectures that have no row yet
    python bench/agreement.py --only "bert|llama" --again

Rows go into `bench/results/agreement.json` as they come, so a run may be stopped and started again. The networks are
built and compared in another process, which is ended where one takes longer than `--seconds` or memory is short.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "agreement.json"
SOURCES = ("state_dict", "bin", "folder", "folder_rebuilt")
TOLERANCE = 1e-5
_MEMORY = 6 * 2**30
_MOST_ENCODED = 400_000  # weights of networks of which z is computed; batches are compared of all


# ---------------------------------------------------------------------------------------------------------------------
# Compared batches


def _tensors(batch: Any) -> list[tuple[int, str, int, tuple[Any, ...]]]:
    """Return layer, name, type and fingerprint of each tensor of a batch of one."""
    layers = batch.layer_ptr.diff().tolist()
    owners = [i for i, count in enumerate(layers) for _ in range(count)]
    places = batch.chunk_ptr[batch.tensor_ptr].tolist()
    found = []
    for s, (owner, name, kind) in enumerate(zip(owners, batch.names[0][1], batch.tensor_type.tolist(), strict=True)):
        values = batch.values.detach()[places[s] : places[s + 1]]
        scale = float(batch.tensor_scale[s].detach())
        print_of = (
            len(values),
            round(scale, 6),
            round(float(values[:64].double().sum()), 4),
            round(float(values[-1]), 4),
        )
        found.append((owner, name, kind, print_of))
    return found


def difference(one: Any, other: Any) -> str:
    """Return how two batches of one network differ in what is encoded, "" if they do not; names do not count."""
    import torch

    fields = ("values", "chunk_ptr", "tensor_ptr", "layer_ptr", "layer_level", "tensor_type", "tensor_scale")
    if all(torch.equal(getattr(one, field), getattr(other, field)) for field in fields):
        return ""
    mine, theirs = _tensors(one), _tensors(other)
    prints = [sorted(entry[3] for entry in entries) for entries in (mine, theirs)]
    if prints[0] != prints[1]:
        lacking, extra = _without(mine, theirs), _without(theirs, mine)
        words = [f"{len(part)} {what}: {', '.join(part[:3])}" for part, what in ((lacking, "lacking"), (extra, "more"))
                 if part]  # fmt: skip
        return "tensors: " + "; ".join(words)
    for a, b in zip(mine, theirs, strict=True):
        if a[3] != b[3]:
            return f"order: {b[1]} in the place of {a[1]}"
    for a, b in zip(mine, theirs, strict=True):
        if a[0] != b[0]:
            return f"layers: {b[1]} is in layer {b[0]} and not {a[0]}"
    kinds = [f"{b[1]} is {b[2]} and not {a[2]}" for a, b in zip(mine, theirs, strict=True) if a[2] != b[2]]
    return f"types: {len(kinds)}, {kinds[0]}" if kinds else "cut otherwise"


def _without(entries: list[Any], others: list[Any]) -> list[str]:
    counts: dict[Any, int] = {}
    for entry in others:
        counts[entry[3]] = counts.get(entry[3], 0) + 1
    found = []
    for entry in entries:
        counts[entry[3]] = counts.get(entry[3], 0) - 1
        if counts[entry[3]] < 0:
            found.append(entry[1])
    return found


def rank_correlation(network: Any) -> float | None:
    """Return Spearman's correlation of the places of layers by names with those by definition; None for one layer."""
    import sne_fast

    places = []
    for order in ("names", "definition"):
        names = sne_fast.pack([network], kinds="names", order=order, nonfinite="keep").names[0][1]
        places.append({layer: i for i, layer in enumerate(dict.fromkeys(name.rpartition(".")[0] for name in names))})
    common = [layer for layer in places[0] if layer in places[1]]
    n = len(common)
    if n < 2:
        return None
    ranks = {layer: i for i, layer in enumerate(sorted(common, key=places[1].__getitem__))}
    return 1 - 6 * sum((i - ranks[layer]) ** 2 for i, layer in enumerate(common)) / (n * (n * n - 1))


# ---------------------------------------------------------------------------------------------------------------------
# One architecture


def randomise(network: Any) -> None:
    """Give every trained parameter and running statistic values of its own, as training does."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + 0.01)
        for name, buffer in network.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)


def compare(network: Any, folder: Path, encoder: Any = None) -> dict[str, Any]:
    """Return the row of one network: what differs by source, largest difference of z, and the rank correlation.

    Args:
        network: the module; it is saved by its `save_pretrained` where it has one.
        folder: an empty folder.
        encoder: what z is computed with, of sources that differ; all of them count as different without.
    """
    import torch
    from safetensors.torch import save_model

    import sne_fast

    state = network.state_dict()
    torch.save(state, folder / "weights.bin")
    saved = folder / "saved"
    if hasattr(network, "save_pretrained"):
        network.save_pretrained(saved)
    else:
        saved.mkdir()
        save_model(network, str(saved / "model.safetensors"))
    options: dict[str, Any] = {"kinds": "names", "nonfinite": "keep"}
    want = sne_fast.pack([network], **options)
    z = None
    row: dict[str, Any] = {"weights": want.num_weights, "layers": len(want.layer_level), "differs": {}, "z": {}}
    sources: dict[str, Any] = {"state_dict": state, "bin": folder / "weights.bin", "folder": saved}
    if (saved / "config.json").exists():
        sources["folder_rebuilt"] = saved
    for source, given in sources.items():
        try:
            if source == "folder_rebuilt":
                given = rebuilt(given)
            batch = sne_fast.pack([given], **options)
        except Exception as error:
            row["differs"][source] = f"{type(error).__name__}: {error}".replace(str(folder), "")[:300]
            continue
        row["differs"][source] = difference(want, batch)
        if row["differs"][source] and encoder is not None and want.num_weights <= _MOST_ENCODED:
            with torch.no_grad():
                z = encoder(want) if z is None else z
                row["z"][source] = float((encoder(batch) - z).abs().max() / z.abs().max())
    row["spearman"] = rank_correlation(network)
    return row


def rebuilt(folder: Path) -> Any:
    """Return the checkpoint of a folder under the names of its module."""
    from sne_fast.data.transformers_folders import read_transformers_folder

    return read_transformers_folder(folder)


def agrees(row: dict[str, Any], source: str) -> bool:
    """Return whether z of a source is that of the module."""
    return row["differs"].get(source) == "" or row["z"].get(source, 1) <= TOLERANCE


# ---------------------------------------------------------------------------------------------------------------------
# The process that compares, and the one that waits for it


def work() -> None:
    """Compare the architectures named on stdin, one a line, and write a row of JSON for each."""
    import logging
    import warnings

    import torch
    import transformers
    from named_networks import build
    from tiny_configs import tiny_model

    import sne_fast

    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = sne_fast.SNE(hidden_dim=16, num_heads=2, set_attention="isab").eval()
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        family, _, name = line.strip().partition("/")
        row: dict[str, Any] = {"name": line.strip()}
        begin = time.perf_counter()
        try:
            network = build(family, name) if family in ("torchvision", "timm") else tiny_model(name, family)
        except Exception as error:
            row["not_built"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        else:
            try:
                randomise(network)
                with tempfile.TemporaryDirectory() as folder:
                    row |= compare(network.eval(), Path(folder), encoder)
            except Exception as error:
                traceback.print_exc()
                row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        row["seconds"] = round(time.perf_counter() - begin, 1)
        print(json.dumps(row), file=out, flush=True)


class Worker:
    """The other process, started when it is needed."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def row(self, name: str, seconds: float) -> dict[str, Any]:
        """Return the row of an architecture, or why there is none."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--work"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            seconds += 60  # for imports
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        self.process.kill()
        ended = self.process.wait()
        self.process = None
        return {"name": name, "failed": f"ended by signal or error {ended}" if ready else f"took over {seconds:.0f} s"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression that a name must contain")
    parser.add_argument("--again", action="store_true", help="also those that have a row")
    parser.add_argument("--every", type=int, default=1, help="each how-manieth architecture")
    parser.add_argument("--seconds", type=float, default=60, help="time limit of an architecture")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work()
        return
    from named_networks import NAMES
    from tiny_configs import architectures

    import sne_fast  # noqa: F401  (missing, it should be said at once and not by every row)

    rows = {row["name"]: row for row in json.loads(args.out.read_text())["rows"]} if args.out.exists() else {}
    names = [*NAMES, *("/".join(pair) for pair in architectures())]
    worker, begin = Worker(), time.time()
    todo = [n for n in names[:: args.every] if re.search(args.only, n) and (args.again or n not in rows)]
    for i, name in enumerate(todo):
        rows[name] = worker.row(name, args.seconds)
        if i % 20 == 19 or i == len(todo) - 1:
            write(args.out, [rows[name] for name in names if name in rows])
            print(f"{i + 1} of {len(todo)}, {time.time() - begin:.0f} s", file=sys.stderr, flush=True)


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows, one a line, with the versions that they are of."""
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    text = f'{{"versions": {json.dumps(versions)},\n "rows": [\n{lines}\n]}}\n'
    temporary = file.with_suffix(".part")
    temporary.write_text(text)
    temporary.replace(file)


if __name__ == "__main__":
    main()
