"""Make files of small trained networks whose history is known: `make_collection`.

Networks of `transformers`, small CNNs and SIRENs are trained for a few steps on the digits of scikit-learn: as images,
as sequences of 64 grey levels, or as functions of the place. A family is ten files: a network trained from random
weights, and what was made of it by more training, averaging, pruning, rounding, a new output layer, copying, and
permuting hidden units. They are safetensors, `.pt`, trainers' checkpoints, folders of `save_pretrained`, whole and in
shards, GGUF, ONNX and HDF5.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from real_formats import COMMON, WRITERS
from torch import Tensor, nn
from torch.nn import functional

from sne_fast import symmetry

FAMILY_SIZE = 10
STEPS, TUNING_STEPS = 40, 6
BATCH = 16
LEVELS = 18  # 17 grey levels, and one to begin with


class Siren(nn.Module):
    """A network of sines from places `(n, 2)` to grey levels `(n, 1)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, 1)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.sin(6 * layer(x))
        return self.layers[-1](x)


@dataclass(frozen=True)
class Kind:
    """A kind of networks.

    Attributes:
        build: returns a network of a width, of random weights.
        example: inputs of a network and what it is to give, by name, of images `(n, 8, 8)` in 0..16 and labels `(n,)`.
        head: the output layer, for kinds in which it is a layer of its own.
        converted: another format in which such networks are found, where names and layouts differ.
        rate: learning rate of Adam.
    """

    build: Callable[[int], nn.Module]
    example: Callable[[Tensor, Tensor], dict[str, Tensor]]
    head: str | None = None
    converted: str | None = None
    rate: float = 2e-3


def make_collection(folder: Path, families: int) -> list[dict[str, Any]]:
    """Write the families that are missing, and return a row for every file.

    Returns:
        Rows with `path`, `family`, `recipe` (the kind and the width), `relation`, `parents` (paths, none for a network
        that was trained from random weights), and `format`.
    """
    rows: list[dict[str, Any]] = []
    for number in range(families):
        place = folder / f"family{number:03}"
        if not (place / "truth.json").exists():
            unfinished = folder / f"unfinished{number:03}"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            _Family(number, unfinished).make()
            os.replace(unfinished, place)
        for row in json.loads((place / "truth.json").read_text()):
            own = {"path": str(place / row["path"]), "parents": [str(place / parent) for parent in row["parents"]]}
            rows.append({**row, **own})
    return rows


class _Family:
    def __init__(self, number: int, folder: Path) -> None:
        names = list(kinds())
        self.number, self.folder, self.name = number, folder, names[number % len(names)]
        self.kind, self.width = kinds()[self.name], (32, 48)[number // len(names) % 2]
        self.rows: list[dict[str, Any]] = []
        self.networks: dict[str, nn.Module] = {}

    def make(self) -> None:
        torch.manual_seed(self.number)
        self._add("base", self._trained(self.kind.build(self.width), STEPS, range(5)))
        self._add("tuned", self._trained(self._copy("base"), TUNING_STEPS, range(5, 8)), "base")
        self._add("sibling", self._trained(self._copy("base"), TUNING_STEPS, range(2, 5)), "base")
        self._add("grandchild", self._trained(self._copy("tuned"), TUNING_STEPS, range(10)), "tuned")
        self._add("merged", self._mean("tuned", "sibling"), "tuned", "sibling")
        of = ("base", "tuned", "sibling", "grandchild")[self.number // 4 % 4]
        self._add("pruned", self._changed(of, lambda w: w * (w.abs() > w.abs().flatten().quantile(0.5))), of)
        self._add("rounded", self._changed("sibling", _rounded), "sibling")
        if self.kind.head is not None and self.number // 10 % 2:
            self._add("head", self._with_head("tuned"), "tuned")
        else:
            self._add("half", self._copy("grandchild").to(torch.bfloat16), "grandchild")
        self._add("copy", self.networks["base"], "base", form=self.kind.converted)
        self._add("permuted", self._permuted("tuned"), "tuned")
        (self.folder / "truth.json").write_text(json.dumps(self.rows, indent=1))

    def _add(self, relation: str, network: nn.Module, *parents: str, form: str | None = None) -> None:
        forms = [name for name in COMMON if hasattr(network, "save_pretrained") or name not in ("folder", "shards")]
        form = form or forms[(self.number // len(kinds()) + len(self.rows)) % len(forms)]
        at = self.folder / f"network{len(self.rows)}"
        path = WRITERS[form](network, at)
        made = {row["relation"]: row["path"] for row in self.rows}
        self.networks[relation] = network
        self.rows.append({
            "path": path.name, "family": self.number, "recipe": f"{self.name} {self.width}", "relation": relation,
            "parents": [made[parent] for parent in parents], "format": form,
        })  # fmt: skip

    def _copy(self, of: str) -> nn.Module:
        return copy.deepcopy(self.networks[of])

    def _trained(self, network: nn.Module, steps: int, classes: range) -> nn.Module:
        """Train a network in place on the digits of some classes."""
        images, labels = digits()
        rows = torch.isin(labels, torch.tensor(list(classes))).nonzero()[:, 0]
        optimiser = torch.optim.Adam(network.parameters(), lr=self.kind.rate)
        slower = torch.optim.lr_scheduler.LinearLR(optimiser, 1, 0.05, steps)
        network.train()
        for _ in range(steps):
            chosen = rows[torch.randint(len(rows), (BATCH,))]
            loss = _loss(network, self.kind.example(images[chosen], labels[chosen]))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            slower.step()
        return network.eval()

    def _changed(self, of: str, change: Callable[[Tensor], Tensor]) -> nn.Module:
        network = self._copy(of)
        with torch.no_grad():
            for weight in network.parameters():
                if weight.ndim >= 2:
                    weight.copy_(change(weight))
        return network

    def _mean(self, one: str, other: str) -> nn.Module:
        network = self._copy(one)
        theirs = dict(self.networks[other].named_parameters())
        with torch.no_grad():
            for name, weight in network.named_parameters():
                weight.copy_((weight + theirs[name]) / 2)
        return network

    def _with_head(self, of: str) -> nn.Module:
        network, name = self._copy(of), str(self.kind.head)
        old = network.get_submodule(name)
        new = nn.Linear(old.in_features, 3, bias=old.bias is not None)
        network.get_submodule(name.rpartition(".")[0]).register_module(name.rpartition(".")[2], new)
        return network

    def _permuted(self, of: str) -> nn.Module:
        network = self._copy(of)
        images, labels = digits()
        example = self.kind.example(images[:2], labels[:2])
        inputs = {key: tensor for key, tensor in example.items() if key not in ("labels", "wanted")}
        found = symmetry.trace(network, inputs.get("x", inputs))
        network.load_state_dict(found.permute_state_dict(network.state_dict()))
        return network


def _rounded(weight: Tensor) -> Tensor:
    step = weight.abs().max() / 127
    return (weight / step).round() * step


def _loss(network: nn.Module, example: dict[str, Tensor]) -> Tensor:
    if "x" not in example:
        return network(**example).loss
    found, wanted = network(example["x"]), example["wanted"]
    return functional.mse_loss(found, wanted) if wanted.is_floating_point() else functional.cross_entropy(found, wanted)


_CACHED: dict[str, Any] = {}


def digits() -> tuple[Tensor, Tensor]:
    """Return the images `(1797, 8, 8)` in 0..16 and the labels `(1797,)`."""
    if "digits" not in _CACHED:
        from sklearn.datasets import load_digits

        held = load_digits()
        _CACHED["digits"] = torch.tensor(held.images).float(), torch.tensor(held.target).long()
    return _CACHED["digits"]


def kinds() -> dict[str, Kind]:
    """Return the kinds of networks by name."""
    if "kinds" not in _CACHED:
        _CACHED["kinds"] = dict(_kinds())
    return _CACHED["kinds"]


def _kinds() -> Iterator[tuple[str, Kind]]:
    import transformers as hf

    hf.utils.logging.disable_progress_bar()

    def tokens(images: Tensor) -> Tensor:
        return images.flatten(1).long()

    def language(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"input_ids": tokens(images), "labels": tokens(images)}

    def translation(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        held = tokens(images)
        return {"input_ids": held[:, :32], "decoder_input_ids": held[:, 31:63], "labels": held[:, 32:].contiguous()}

    def text(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"input_ids": tokens(images), "labels": labels}

    def vision(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": images[:, None] / 16, "labels": labels}

    def plain(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"x": images[:, None] / 16, "wanted": labels}

    def field(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        line = torch.linspace(-1, 1, 8)
        grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
        return {"x": grid, "wanted": images[0].reshape(-1, 1) / 16}

    few = {"num_hidden_layers": 2, "num_attention_heads": 4}
    yield "gpt2", Kind(lambda w: hf.GPT2LMHeadModel(hf.GPT2Config(
        vocab_size=LEVELS, n_positions=64, n_embd=w, n_layer=2, n_head=4)), language)  # fmt: skip
    yield "llama", Kind(lambda w: hf.LlamaForCausalLM(hf.LlamaConfig(
        vocab_size=LEVELS, hidden_size=w, intermediate_size=2 * w, num_key_value_heads=2, max_position_embeddings=64,
        **few)), language, "lm_head", "gguf")  # fmt: skip
    yield "bert", Kind(lambda w: hf.BertForSequenceClassification(hf.BertConfig(
        vocab_size=LEVELS, hidden_size=w, intermediate_size=4 * w, max_position_embeddings=64, num_labels=10, **few)),
        text, "classifier")  # fmt: skip
    yield "distilbert", Kind(lambda w: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(
        vocab_size=LEVELS, dim=w, n_layers=2, n_heads=4, hidden_dim=4 * w, max_position_embeddings=64, num_labels=10)),
        text, "classifier")  # fmt: skip
    yield "t5", Kind(lambda w: hf.T5ForConditionalGeneration(hf.T5Config(
        vocab_size=LEVELS, d_model=w, d_kv=w // 4, d_ff=2 * w, num_layers=2, num_heads=4, decoder_start_token_id=0)),
        translation, rate=1e-2)  # fmt: skip
    yield "vit", Kind(lambda w: hf.ViTForImageClassification(hf.ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=w, intermediate_size=2 * w, num_labels=10, **few)),
        vision, "classifier")  # fmt: skip
    yield "resnet", Kind(lambda w: hf.ResNetForImageClassification(hf.ResNetConfig(
        num_channels=1, embedding_size=w // 2, hidden_sizes=[w // 2, w], depths=[1, 1], layer_type="basic",
        num_labels=10)), vision, "classifier.1", rate=4e-3)  # fmt: skip
    yield "convnext", Kind(lambda w: hf.ConvNextForImageClassification(hf.ConvNextConfig(
        num_channels=1, patch_size=2, num_stages=2, hidden_sizes=[w // 2, w], depths=[1, 1], image_size=8,
        num_labels=10)), vision, "classifier")  # fmt: skip
    yield "cnn", Kind(lambda w: nn.Sequential(
        nn.Conv2d(1, w // 2, 3, padding=1), nn.ReLU(), nn.Conv2d(w // 2, w, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * w, 10)), plain, "5", "hdf5")  # fmt: skip
    yield "siren", Kind(Siren, field, "layers.2", "onnx", rate=5e-3)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the numbers of files by recipe, relation and format."""
    columns = ("recipe", "relation", "format")
    return {name: {value: sum(row[name] == value for row in rows) for value in sorted({row[name] for row in rows})}
            for name in columns}  # fmt: skip
