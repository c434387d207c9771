"""Networks of every family whose symmetry is traced: constructor, inputs, and the groups `(units, tables)` expected.

Shared by the tests of tracing and of permuted batches. `tables` counts independent permutations: one per head of the
units inside it, one per group of a grouped convolution.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.networks import make
from sne_fast.data.batch_checks import TENSORS
from sne_fast.symmetry.checking import random_weights


class Fused(nn.Module):
    """Attention with one projection for queries, keys and values, as vision transformers write it; tied embeddings."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(7, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.out = nn.Linear(width, 7, bias=False)
        self.out.weight = self.embedding.weight

    def attend(self, x: Tensor) -> Tensor:
        b, n, e = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, e // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, n, e)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.out(x + self.proj(self.attend(self.norm(x))))


class Chunked(Fused):
    """Fused attention with the projection cut by `chunk`, and softmax and products written out."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (z.view(*z.shape[:2], self.heads, -1).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
        return ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Rotary(Fused):
    """Rotary position codes, which freeze the units of queries and keys, and leave heads and values."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (z.view(*z.shape[:2], self.heads, -1).transpose(1, 2) for z in self.qkv(x).split(x.shape[-1], -1))
        angle = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1])
        cos, sin = (torch.cat([f, f], -1).to(x.dtype) for f in (angle.cos(), angle.sin()))

        def rotate(z: Tensor) -> Tensor:
            a, b = z.chunk(2, -1)
            return z * cos + torch.cat([-b, a], -1) * sin

        return ((rotate(q) @ rotate(k).mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Separate(nn.Module):
    """Grouped-query attention with three projections, whose two key heads serve four query heads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.q, self.k, self.v, self.o = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(12, 8)
        self.norm, self.head = nn.RMSNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (f(self.norm(x)).unflatten(-1, (-1, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (z.repeat_interleave(2, dim=1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x + self.o(y)).mean(1)


class Encoder(nn.Module):
    """torch's own encoder and decoder, between projections."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embed, self.encoder = nn.Linear(4, 8), nn.TransformerEncoder(layer, 1)
        self.decoder, self.out = nn.TransformerDecoderLayer(8, 2, 12, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.encoder(self.embed(x))
        return self.out(self.decoder(memory, memory))


class CrossAttention(nn.Module):
    """Separate projections of torch's attention, with bias_k and bias_v."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, add_bias_kv=True, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.out(self.attention(self.query(x), memory, x)[0])


class TinyViT(nn.Module):
    """Patches by a convolution, a class token, position codes, an encoder layer; the head reads the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 8, 4, 4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, activation="gelu")
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.layer(x))[:, 0])


class PaddedShortcut(nn.Module):
    """The parameterless shortcut of CIFAR ResNets: every second pixel, new channels filled with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.bn, self.out = nn.BatchNorm2d(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.out((self.bn(self.b(x)) + shortcut).relu().mean((2, 3)))


class Dense(nn.Module):
    """DenseNet: features joined, normalised together, then flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.bn, self.c, self.out = nn.BatchNorm2d(9), nn.Conv2d(9, 3, 1), nn.Linear(3 * 4 + 9 * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = torch.cat([x, self.b(x.relu())], 1)
        x = torch.cat([self.c(self.bn(x).relu()), x], 1)
        return self.out(F.avg_pool2d(x, 2).flatten(1))


class ShiftedWindows(nn.Module):
    """Attention in rolled windows of an image, with a table of relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Linear(3, 8), nn.Linear(8, 24)
        self.proj, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
        self.table = nn.Parameter(torch.randn(9, 2))
        place = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        apart = (place[:, :, None] - place[:, None]) + 1
        self.register_buffer("index", (3 * apart[0] + apart[1]).flatten())

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, h, w, c = x.shape
        y = torch.roll(x, (-1, -1), (1, 2)).view(b, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        q, k, v = self.qkv(y).reshape(-1, 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT + self.table[self.index].view(4, 4, 2).permute(2, 0, 1)
        y = self.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, c))
        y = y.view(b, h // 2, w // 2, 2, 2, c).transpose(2, 3).reshape(b, h, w, c)
        return self.head((x + torch.roll(y, (1, 1), (1, 2))).mean((1, 2)))


class ChannelShuffle(nn.Module):
    """Two grouped convolutions with the channels of the groups interleaved between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2)
        self.c, self.out = nn.Conv2d(8, 8, 1, groups=4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.out(self.c(x).relu().mean((2, 3)))


class Inverted(nn.Module):
    """Depthwise convolution, squeeze and excitation, channels-last norm and a layer scale, with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale, self.head = nn.Parameter(torch.randn(8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.silu(self.depthwise(x))
        y = y * self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))).sigmoid()
        y = self.scale * self.down(F.gelu(self.up(self.norm(y.permute(0, 2, 3, 1)))))
        return self.head((x + y.permute(0, 3, 1, 2)).mean((-2, -1)))


class UNet(nn.Module):
    """Down by pooling and up by a transposed convolution, concatenated with the features before the pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.up, self.c, self.out = nn.ConvTranspose2d(6, 3, 2, 2), nn.Conv2d(7, 5, 3, padding=1), nn.Conv2d(5, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).relu()
        b = self.b(F.max_pool2d(a, 2)).relu()
        return self.out(self.c(torch.cat([self.up(b), a], 1)).relu())


class Experts(nn.Module):
    """A mixture of experts: each has its own hidden units, and experts are permuted as wholes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gate, self.out = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)
        self.up, self.down = nn.Parameter(torch.randn(3, 6, 5)), nn.Parameter(torch.randn(3, 5, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).tanh()
        y = torch.einsum("bnj,njk->bnk", torch.einsum("bi,nij->bnj", h, self.up).relu(), self.down)
        return self.out((y * self.gate(h).softmax(-1)[..., None]).sum(1))


EDGES = torch.tensor([[0, 1, 2, 3, 3, 1], [1, 2, 3, 0, 1, 3]])


class MessagePassing(nn.Module):
    """Graph convolutions that gather from sources and add up at targets, each in another way of writing it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.one, self.two, self.out = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def spread(self, h: Tensor) -> Tensor:
        source, target = EDGES
        messages = h.gather(0, source[:, None].expand(-1, h.shape[1])) if self.how == "gather" else h[source]
        zeros = torch.zeros_like(h)
        places = target[:, None].expand_as(messages)
        if self.how == "index_add":
            return zeros.index_add(0, target, messages)
        if self.how == "index_put":
            return zeros.index_put_((target,), messages, accumulate=True)
        if self.how in ("mean", "amax", "sum"):
            return zeros.scatter_reduce_(0, places, messages, self.how, include_self=self.how == "sum")
        if self.how == "mask":
            known = torch.tensor([True, False, True, True])
            zeros[known] = h[known]
            return zeros
        if self.how == "index_reduce":
            return zeros.index_reduce_(0, target, messages, "amax", include_self=False)
        return zeros.scatter_add_(0, places, messages)

    def forward(self, x: Tensor) -> Tensor:
        h = F.hardswish(self.spread(self.one(x)))
        return self.out(F.logsigmoid(self.spread(self.two(h))))


class RoutedExperts(nn.Module):
    """A mixture of experts in a loop over experts, one of which gets no token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(4, 6), nn.Linear(6, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6)) for _ in range(3))
        self.register_buffer("expert", torch.tensor([0, 2, 2, 0, 2]))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).tanh()
        y = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            (rows,) = torch.where(self.expert == e)
            y.index_add_(0, rows, expert(h[rows]))
        return self.out(h + y)


class GroupedExperts(nn.Module):
    """A mixture of experts whose tokens are sorted by expert, for one product of ragged groups."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(8, 8), nn.Linear(8, 2)
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 32) / 3), nn.Parameter(torch.randn(3, 16, 8) / 4)
        self.register_buffer("expert", torch.tensor([0, 2, 2, 0, 2]))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).tanh()
        order = self.expert.argsort(stable=True)
        ends = torch.bincount(self.expert, minlength=3).cumsum(0).to(torch.int32)
        gate, up = torch._grouped_mm(h[order], self.up, offs=ends).chunk(2, -1)
        y = torch._grouped_mm(F.silu(gate) * up, self.down, offs=ends)
        return self.out(h + y[order.argsort()])


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.out = kind(3, 5, num_layers=2, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


class Gated(nn.Module):
    """GLU, weight normalisation, and a hidden layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(4, 12), nn.RMSNorm(6)
        self.b, self.c = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.norm(F.glu(self.a(x)))).sin())


def _seq(*layers: nn.Module):
    return lambda: copy.deepcopy(nn.Sequential(*layers))


def _image(channels: int, side: int):
    return lambda: torch.randn(2, channels, side, side)


def _tokens() -> Tensor:
    return torch.tensor([[0, 1, 4], [2, 2, 3]])


_LAYER = [(2, 1), (4, 2), (4, 2), (16, 1)]  # heads, queries and keys, values, MLP

CONVOLUTIONS = {
    "conv-flatten-linear": (lambda: make("cnn"), lambda: torch.randn(2, 1, 4, 6), [(3, 1), (4, 1)]),
    "lenet": (lambda: make("lenet"), _image(1, 28), [(6, 1), (16, 1), (84, 1), (120, 1)]),
    "depthwise": (
        _seq(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Conv2d(8, 16, 3, groups=8), nn.ReLU(), nn.Conv2d(16, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(6, 3),
        ), _image(3, 12), [(8, 1), (2, 8), (6, 1)],
    ),
    "grouped": (
        _seq(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.BatchNorm2d(12), nn.GELU(),
            nn.ConvTranspose2d(12, 8, 3, groups=4), nn.SiLU(), nn.ConvTranspose2d(8, 5, 3), nn.Conv2d(5, 3, 1),
        ), _image(3, 8), [(4, 1), (2, 4), (3, 4), (2, 4), (5, 1)],
    ),
    "group-norm": (
        _seq(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 3)),
        _image(1, 6), [(2, 1), (4, 2)],
    ),
    "instance and layer norm": (
        _seq(
            nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.PReLU(8), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3),
            nn.LayerNorm((4, 3, 3)), nn.Flatten(), nn.Linear(36, 3),
        ), _image(3, 12), [(8, 1), (4, 1)],
    ),
    "pixel-shuffle": (
        _seq(nn.Conv2d(1, 8, 3), nn.PixelShuffle(2), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(2, 1, 1)),
        _image(1, 4), [(2, 1)],
    ),
    "1d": (_seq(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(12, 2)),
           lambda: torch.randn(2, 2, 8), [(4, 1)]),
    "residual with projection": (lambda: make("resnet_block"), _image(1, 8), [(2, 1), (2, 1), (3, 1), (3, 1)]),
    "channel shuffle": (ChannelShuffle, _image(3, 4), [(2, 1), (4, 2), (4, 1), (2, 4)]),
    "inverted": (Inverted, _image(3, 8), [(8, 1), (2, 1), (16, 1)]),
    "u-net": (UNet, _image(1, 8), [(4, 1), (6, 1), (3, 1), (5, 1)]),
    "generator": (
        _seq(
            nn.Linear(5, 32), nn.Unflatten(1, (8, 2, 2)), nn.ConvTranspose2d(8, 4, 2, 2), nn.ELU(), nn.Conv2d(4, 1, 3)
        ), lambda: torch.randn(2, 5), [(8, 1), (4, 1)],
    ),
    "padded shortcut": (PaddedShortcut, _image(3, 4), [(4, 1), (2, 1), (2, 1)]),
    "dense": (Dense, _image(3, 4), [(4, 1), (5, 1), (3, 1)]),
}  # fmt: skip

TRANSFORMERS = {
    **{
        f"encoder layer, norm {'first' if first else 'last'}, {activation}": (
            lambda f=first, a=activation: nn.TransformerEncoderLayer(8, 2, 16, norm_first=f, activation=a),
            lambda: torch.randn(5, 2, 8), _LAYER,
        )
        for first in (False, True) for activation in ("relu", "gelu")
    },
    "with embeddings": (lambda: make("transformer"), _tokens, [(4, 1), (2, 1), (2, 2), (2, 2), (16, 1)]),
    "tied embeddings": (lambda: make("transformer_tied"), _tokens, [(4, 1), (2, 1), (2, 2), (2, 2), (16, 1)]),
    "fused qkv": (lambda: Fused(8, 2), lambda: torch.randint(0, 7, (2, 5)), [(8, 1), (2, 1), (4, 2), (4, 2)]),
    "fused qkv, chunked": (lambda: Chunked(8, 2), lambda: torch.randint(0, 7, (2, 5)),
                           [(8, 1), (2, 1), (4, 2), (4, 2)]),
    "rotary": (lambda: Rotary(8, 2), lambda: torch.randint(0, 7, (2, 5)), [(8, 1), (2, 1), (4, 2)]),
    "grouped queries": (Separate, lambda: torch.randn(2, 5, 3), [(8, 1), (2, 1), (2, 2), (3, 2), (3, 2)]),
    "shifted windows": (ShiftedWindows, lambda: torch.randn(2, 4, 4, 3), [(8, 1), (2, 1), (4, 2), (4, 2)]),
    "encoder and decoder": (Encoder, lambda: torch.randn(2, 5, 4),
                            [(8, 1), *_LAYER, *[(2, 1), (4, 2), (4, 2)] * 2, (12, 1)]),
    "cross attention": (CrossAttention, lambda: (torch.randn(2, 5, 4), torch.randn(2, 5, 6)),
                        [(8, 1), (2, 1), (4, 2), (4, 2), (8, 1)]),
    "vit": (TinyViT, _image(1, 8), [(8, 1), *_LAYER]),
}  # fmt: skip

OTHERS = {
    "mlp": (lambda: make("mlp"), lambda: torch.randn(3, 5), [(7, 1), (6, 1)]),
    "sine": (lambda: make("inr"), lambda: torch.randn(3, 1), [(32, 1), (32, 1)]),
    "experts": (Experts, lambda: torch.randn(4, 4), [(3, 1), (6, 1), (5, 3), (6, 1)]),
    "gated": (Gated, lambda: torch.randn(4, 4), [(6, 1), (6, 1)]),
    "routed experts": (RoutedExperts, lambda: torch.randn(5, 4), [(6, 1), (5, 1), (5, 1), (5, 1)]),
    "experts in groups": (GroupedExperts, lambda: torch.randn(5, 8), [(8, 1), (16, 1)]),
    **{
        f"messages, {how}": (lambda h=how: MessagePassing(h), lambda: torch.randn(4, 3), [(8, 1), (6, 1)])
        for how in (
            "scatter_add",
            "sum",
            "mean",
            "amax",
            "index_add",
            "index_put",
            "index_reduce",
            "gather",
        )
    },
    "activations": (
        _seq(
            nn.Linear(4, 6),
            nn.Hardswish(),
            nn.Linear(6, 5),
            nn.LogSigmoid(),
            nn.Linear(5, 7),
            nn.RReLU(),
            nn.Linear(7, 3),
            nn.Hardtanh(),
            nn.Linear(3, 2),
        ),
        lambda: torch.randn(4, 4),
        [(6, 1), (5, 1), (7, 1), (3, 1)],
    ),
    "unfolded images": (
        _seq(
            nn.Conv2d(1, 4, 3),
            nn.Unfold(2),
            nn.Fold((4, 4), 2),
            nn.PixelUnshuffle(2),
            nn.ChannelShuffle(4),
            nn.Conv2d(16, 2, 1),
        ),
        _image(1, 6),
        [(4, 1)],
    ),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda: torch.randn(2, 4, 3), [(5, 1), (5, 1)]),
    "gru": (lambda: Recurrent(nn.GRU), lambda: torch.randn(2, 4, 3), [(5, 1), (5, 1)]),
}

CHUNKINGS = ["flat", "neuron", "kernel"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_same(a, b):
    """Assert that two batches have the same bits in every field."""
    for field in TENSORS:
        assert torch.equal(getattr(a, field), getattr(b, field)), field
    assert (a.chunk_size, a.chunking, a.shapes) == (b.chunk_size, b.chunking, b.shapes)
    assert [tensors for _, tensors in a.names] == [tensors for _, tensors in b.names]


def weights(net, seed):
    """Return a state_dict in its own order, with random parameters and running statistics."""
    found = random_weights(net, generator(seed))
    return {key: found.get(key, tensor) for key, tensor in net.state_dict().items()}
