"""Symmetries traced in random networks keep the function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sne_fast import symmetry as sym


@st.composite
def random_nets(draw):
    """Draw layers with random widths, norms, groups, shortcuts and joins, then a flattened or pooled head."""
    widths = st.sampled_from([2, 4, 6])

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.kinds, layers, width = [], [], 2
            for _ in range(draw(st.integers(1, 5))):
                kind = draw(st.sampled_from(["conv", "group", "depth", "batch", "gn", "in", "residual", "cat", "glu"]))
                out = width if kind in ("batch", "gn", "in", "residual", "depth") else draw(widths)
                if kind == "conv":
                    layer = nn.Conv2d(width, out, draw(st.sampled_from([1, 3])), padding="same")
                elif kind == "group":
                    layer = nn.Conv2d(width, out, 3, padding=1, groups=2)
                elif kind == "depth":
                    layer = nn.Conv2d(width, width, 3, padding=1, groups=width)
                elif kind == "batch":
                    layer = nn.BatchNorm2d(width)
                elif kind == "gn":
                    layer = nn.GroupNorm(draw(st.sampled_from([1, 2, width])), width)
                elif kind == "in":
                    layer = nn.InstanceNorm2d(width, affine=True)
                elif kind == "residual":
                    layer = nn.Sequential(nn.Conv2d(width, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, width, 1))
                elif kind == "glu":
                    layer = nn.Conv2d(width, 2 * out, 1)
                else:
                    layer = nn.Conv2d(width, out, 1)
                    out += width
                self.kinds.append(kind)
                layers.append(layer)
                width = out
            self.layers = nn.ModuleList(layers)
            self.pool = draw(st.booleans())
            self.head = nn.Linear(width * (1 if self.pool else 16), 3)

        def forward(self, x):
            for kind, layer in zip(self.kinds, self.layers, strict=True):
                y = layer(x)
                if kind == "residual":
                    x = x + y
                elif kind == "cat":
                    x = torch.cat([y, x], 1)
                else:
                    x = F.glu(y, 1) if kind == "glu" else F.elu(y)
            return self.head(x.mean((2, 3)) if self.pool else x.flatten(1))

    return Net()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(random_nets())
def test_random_networks_keep_their_function(net):
    x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    symmetry = sym.trace(net, x, strict=True, check=False)
    net, x = net.double(), x.double()
    assert sym.verify(net, x, symmetry, tolerance=1e-11) <= 1e-11


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_random_reshapes_keep_the_function(data):
    """Views may freeze units of a hidden layer; those still permuted keep the function."""
    shapes = [(24,), (2, 12), (12, 2), (4, 6), (2, 3, 4), (3, 8), (1, 24), (8, 3), (4, 3, 2)]
    steps = data.draw(st.lists(st.tuples(st.sampled_from(shapes), st.integers(0, 7), st.integers(0, 3)), max_size=5))
    a, b = nn.Linear(3, 24), nn.Linear(24, 2)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = a, b

        def forward(self, x):
            h = self.a(x)
            for shape, kind, axis in steps:
                h = h.reshape(len(x), *shape)
                d = 1 + axis % (h.ndim - 1)
                if kind == 0:
                    h = h.transpose(1, d)
                elif kind == 1:
                    h = h.softmax(d)
                elif kind == 2:
                    h = h - h.mean(d, keepdim=True)
                elif kind == 3:
                    h = torch.cat([h.narrow(d, 1, h.shape[d] - 1), h.narrow(d, 0, 1)], d) if h.shape[d] > 1 else h
                elif kind == 4:
                    h = torch.stack([h.select(d, i) * (2 + h.select(d, 0)) for i in range(h.shape[d])], d)
                elif kind == 5:
                    h = h * h.amax(d, keepdim=True)
                elif kind == 6:
                    h = h + torch.cumsum(h, d)
            return self.b(h.reshape(len(x), 24))

    net, x = Net().double(), torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    symmetry = sym.trace(net, x, strict=True, check=False)
    assert sym.verify(net, x, symmetry, tolerance=1e-11) <= 1e-11
