"""Adapters are layers in a canonical form: the same update has the same tensors, however it is factorised."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sne_fast import SNE, WeightBatch, pack
from sne_fast.data.adapters import canonical_factors
from sne_fast.data.batch_summary import skipped_summary
from sne_fast.data.tensor_types import kind_id, role_of

LORA_A, LORA_B, VECTOR = 61, 62, 63  # 8 * 7 + roles 5 to 7


def packed(entries, **options) -> WeightBatch:
    return pack([entries], scale="none", **options)


def tensors(batch: WeightBatch) -> dict[str, Tensor]:
    """Return the tensors of a packed network of matrices and vectors by name."""
    starts = batch.chunk_ptr_host[batch.tensor_ptr_host].tolist()
    return {
        name: batch.values[starts[s] : starts[s + 1]].reshape(batch.shapes[0][s])
        for s, name in enumerate(batch.names[0][1])
    }


def factors(out: int, r: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(r, inputs), torch.randn(out, r)


def refactorised(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return other factors of the same update: by an invertible matrix, and of a higher rank than it has."""
    r = a.shape[0]
    m = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))[0] * torch.linspace(0.5, 8, r, dtype=torch.float64)
    mixed = (torch.linalg.inv(m) @ a.double()).float(), (b.double() @ m).float()
    wide = torch.cat([a, 2 * a, torch.zeros_like(a)]), torch.cat([0.6 * b, 0.2 * b, torch.randn_like(b)], 1)
    return [mixed, wide]


def lora(a: Tensor, b: Tensor, scale: float = 2.0) -> dict[str, Tensor]:
    """Return an adapter as kohya writes it."""
    return {"up.lora_down.weight": a, "up.lora_up.weight": b, "up.alpha": torch.tensor(scale * a.shape[0])}


@pytest.mark.parametrize("size", [(48, 8, 40), (40, 8, 300), (6, 4, 20), (3, 8, 5), (30, 1, 20)])
@pytest.mark.parametrize("statistics", ["none", "tensor"])
def test_the_same_update_in_another_factorisation_has_the_same_encoding(size: tuple[int, int, int], statistics: str):
    a, b = factors(*size)
    torch.manual_seed(1)
    encoder = SNE(hidden_dim=32, statistics=statistics)
    wanted = encoder([lora(a, b)])
    for other in refactorised(a, b):
        torch.testing.assert_close(encoder([lora(*other)]), wanted, atol=1e-5, rtol=0)
        for name, tensor in tensors(packed(lora(*other))).items():
            torch.testing.assert_close(tensor, tensors(packed(lora(a, b)))[name], atol=1e-5, rtol=1e-5)
    assert (encoder([lora(a, -b)]) - wanted).abs().max() > 1e-3


def test_the_factors_make_the_update_with_its_scale() -> None:
    a, b = factors(9, 4, 7)
    batch = packed(lora(a, b, 3.0))
    assert batch.names[0][1] == ("up.lora_A", "up.lora_B") and batch.tensor_type.tolist() == [LORA_A, LORA_B]
    assert batch.layer_ptr.tolist() == [0, 2]
    found = tensors(batch)
    torch.testing.assert_close(found["up.lora_B"] @ found["up.lora_A"], 3 * b @ a)
    s = torch.linalg.svdvals(3 * b.double() @ a.double())
    norms = torch.stack([found["up.lora_A"].norm(dim=1), found["up.lora_B"].norm(dim=0)])
    torch.testing.assert_close(norms.double(), s[:4].sqrt().expand(2, 4), atol=1e-5, rtol=1e-5)
    largest = found["up.lora_B"].gather(0, found["up.lora_B"].abs().argmax(0)[None])
    assert bool((largest > 0).all())
    assert skipped_summary(batch) == ""
    assert dict(batch.skipped[0]) == {
        "up.lora_down.weight": "adapter: taken as 'up.lora_A'", "up.lora_up.weight": "adapter: taken as 'up.lora_B'",
        "up.alpha": "adapter: scale of 'up'",
    }  # fmt: skip


def test_an_update_of_low_rank_has_as_many_rows_as_rank_and_none_has_one() -> None:
    a, b = factors(9, 4, 7)
    a[2:] = a[:2] + a[1]
    one = {"up.lora_A.weight": a, "up.lora_B.weight": b}
    assert packed(one).shapes == (((2, 7), (9, 2)),)
    fresh = packed({**one, "up.lora_B.weight": torch.zeros(9, 4)})  # before training
    assert fresh.shapes == (((1, 7), (9, 1)),) and not fresh.values.any()


@given(
    out=st.integers(1, 40),
    inputs=st.integers(1, 40),
    r=st.integers(1, 12),
    scale=st.sampled_from([-8.0, -0.5, 0.0, 0.01, 2.5]),
    data=st.data(),
)
def test_canonical_factors_make_the_same_update_from_any_factors(
    out: int, inputs: int, r: int, scale: float, data: st.DataObject
) -> None:
    a, b = factors(out, r, inputs, data.draw(st.integers(0, 2**32)))
    small = 10.0 ** -data.draw(st.integers(0, 12))  # of both factors
    first = canonical_factors(small * a, small * b, scale)
    update = scale * small * small * (b.double() @ a.double())
    torch.testing.assert_close((first[1] @ first[0]).double(), update, atol=3e-5 * float(update.abs().max()), rtol=0)
    assert first[0].shape[0] == first[1].shape[1] <= min(out, inputs, r)
    again = canonical_factors(*first)  # one of the canonical form is itself
    for tensor, same in zip(first, again, strict=True):
        torch.testing.assert_close(tensor, same, atol=1e-4 * float(tensor.abs().max()), rtol=0)


def test_entries_of_equal_size_do_not_decide_the_sign_by_rounding() -> None:
    b = torch.tensor([[1.0], [-1.0 - 1e-7], [1.0]])
    for sign in (1, -1):
        assert canonical_factors(sign * torch.ones(1, 4), sign * b)[1][0, 0] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Names


def named(a: str, b: str, **more: Tensor) -> dict[str, Tensor]:
    factor_a, factor_b = factors(6, 2, 5)
    return {a: factor_a, b: factor_b, **more}


FORMS = {
    "PEFT": ("m.q_proj.lora_A.weight", "m.q_proj.lora_B.weight"),
    "PEFT in memory": ("m.q_proj.lora_A.default.weight", "m.q_proj.lora_B.default.weight"),
    "PEFT embedding": ("m.q_proj.lora_embedding_A", "m.q_proj.lora_embedding_B"),
    "PEFT embedding in memory": ("m.q_proj.lora_embedding_A.default", "m.q_proj.lora_embedding_B.default"),
    "loralib": ("m.q_proj.lora_A", "m.q_proj.lora_B"),
    "kohya": ("m.q_proj.lora_down.weight", "m.q_proj.lora_up.weight"),
    "diffusers": ("m.q_proj.lora.down.weight", "m.q_proj.lora.up.weight"),
    "processors of diffusers": ("m.q_proj_lora.down.weight", "m.q_proj_lora.up.weight"),
    "layers of diffusers": ("m.q_proj.lora_linear_layer.down.weight", "m.q_proj.lora_linear_layer.up.weight"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", ["names", "definition"])
def test_the_names_of_every_library_are_one_layer_of_the_adapted_module(form: str, order: str) -> None:
    first = {"m.emb.weight": torch.ones(3, 2), **named(*FORMS[form]), "z.bias": torch.ones(3)}
    batch = packed(first, order=order)
    assert batch.names[0][1] == ("m.emb.weight", "m.q_proj.lora_A", "m.q_proj.lora_B", "z.bias")
    assert batch.tensor_type.tolist()[1:3] == [LORA_A, LORA_B] and batch.layer_ptr.tolist() == [0, 1, 3, 4]
    assert skipped_summary(batch) == "left out: 1 unknown scale of an adapter"
    assert dict(batch.skipped[0])["m.q_proj.scaling"] == "unknown scale of an adapter: taken as 1"


def test_a_module_that_has_weights_itself_keeps_them_in_a_layer_of_its_own() -> None:
    batch = packed({"fc.weight": torch.ones(6, 5), "fc.bias": torch.ones(6), **named("fc.lora_A", "fc.lora_B")})
    assert batch.names[0][1] == ("fc.weight", "fc.bias", "fc.lora.lora_A", "fc.lora.lora_B")
    assert batch.tensor_type.tolist() == [0, 1, LORA_A, LORA_B] and batch.layer_ptr.tolist() == [0, 2, 4]
    top = packed(named("lora_A.weight", "lora_B.weight"))
    assert top.names[0][1] == ("lora_A", "lora_B")


def test_magnitudes_and_biases_belong_to_the_adapter_and_ia3_is_one() -> None:
    more = {
        "fc.lora_B.bias": torch.ones(6),
        "fc.lora_magnitude_vector": torch.ones(1, 6, 1),
        "fc.alpha": torch.ones(()),
    }
    batch = packed(named("fc.lora_A.weight", "fc.lora_B.weight", **more))
    assert batch.names[0][1] == ("fc.lora_A", "fc.lora_B", "fc.lora_magnitude_vector", "fc.lora_bias")
    assert batch.tensor_type.tolist() == [LORA_A, LORA_B, VECTOR, 57] and batch.shapes[0][2] == (6,)
    assert tensors(batch)["fc.lora_bias"].tolist() == [0.5] * 6  # alpha / r
    memory = {"fc.lora_magnitude_vector.default.weight": torch.ones(6)}
    memory |= named("fc.lora_A.default.weight", "fc.lora_B.default.weight")
    file = named("fc.lora_A.weight", "fc.lora_B.weight", **{"fc.lora_magnitude_vector.weight": torch.ones(6)})
    kohya = named("fc.lora_down.weight", "fc.lora_up.weight", **{"fc.dora_scale": torch.ones(6, 1)})
    for state in (memory, file, kohya):
        assert packed(state).names == packed(file).names and packed(state).tensor_type.tolist() == [61, 62, 63]
    ia3 = packed({"k.ia3_l": torch.ones(4, 1), "ff.ia3_l.default": torch.ones(1, 5)})
    assert ia3.names[0][1] == ("ff.ia3_l", "k.ia3_l") and ia3.shapes == (((5,), (4,)),)
    assert ia3.tensor_type.tolist() == [VECTOR] * 2 and len(ia3.layer_ptr) == 3 and not skipped_summary(ia3)


def test_adapters_of_several_names_are_layers_of_their_own() -> None:
    state = named("fc.lora_A.one.weight", "fc.lora_B.one.weight") | named(
        "fc.lora_A.two.weight", "fc.lora_B.two.weight"
    )
    batch = packed(state)
    assert batch.names[0][1] == ("fc.one.lora_A", "fc.one.lora_B", "fc.two.lora_A", "fc.two.lora_B")
    assert batch.layer_ptr.tolist() == [0, 2, 4]


def test_factors_of_convolutions_are_matrices_of_all_kernel_positions() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 3, 3, 3), torch.randn(6, 4, 1, 1)
    found = tensors(packed(lora(a, b, 1.0)))
    assert found["up.lora_A"].shape == (4, 27) and found["up.lora_B"].shape == (6, 4)
    torch.testing.assert_close(found["up.lora_B"] @ found["up.lora_A"], b.flatten(1) @ a.flatten(1))
    encoder = SNE(hidden_dim=32)
    (mixed_a, mixed_b), _ = refactorised(a.flatten(1), b.flatten(1))
    other = lora(mixed_a.reshape(4, 3, 3, 3), mixed_b[..., None, None], 1.0)
    torch.testing.assert_close(encoder([other]), encoder([lora(a, b, 1.0)]), atol=1e-5, rtol=0)


def test_tied_adapters_count_once() -> None:
    a, b = factors(6, 2, 5)
    batch = packed({f"{m}.lora_{k}.weight": t for m in ("x", "y") for k, t in (("A", a), ("B", b))})
    assert batch.names[0][1] == ("x.lora_A", "x.lora_B")
    assert dict(batch.skipped[0])["y.lora_A"] == "tied tensor: of 'x.lora_A'"


def test_what_has_no_canonical_form_is_taken_as_it_is() -> None:
    a, b = factors(6, 4, 5)
    experts = packed({"e.lora_A.weight": a, "e.lora_B.weight": b[:, :2], "e.alpha": torch.tensor(8.0)})
    assert torch.equal(tensors(experts)["e.lora_A"], a) and torch.equal(tensors(experts)["e.lora_B"], 2 * b[:, :2])
    adaptive = {"fc.lora_A": a, "fc.lora_B": b, "fc.lora_E": torch.ones(4, 1)}  # AdaLoRA
    assert set(packed(adaptive).names[0][1]) == set(adaptive) and torch.equal(tensors(packed(adaptive))["fc.lora_A"], a)
    alone = packed({"fc.lora_A.weight": a, "fc.alpha": torch.tensor(3.0)})
    assert alone.names[0][1] == ("fc.alpha", "fc.lora_A.weight")
    flat = packed({"fc.lora_A.weight": a.reshape(-1), "fc.lora_B.weight": torch.ones(())})
    assert flat.names[0][1] == ("fc.lora_A.weight", "fc.lora_B.weight")
    a[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"'up.lora_A'.*NaN"):
        packed(lora(a, b))
    assert packed(lora(a, b), nonfinite="zero").shapes[0] == ((4, 5), (6, 4))


@pytest.mark.parametrize("alpha", [torch.tensor(math.nan), torch.ones(2)])
def test_a_scale_is_one_finite_number(alpha: Tensor) -> None:
    with pytest.raises(ValueError, match=r"tensor 'up.alpha' scales an adapter and must be one finite number"):
        packed({**lora(*factors(6, 2, 5)), "up.alpha": alpha})
    whole = packed({**lora(*factors(6, 2, 5)), "up.alpha": torch.tensor(4)})  # an integer
    torch.testing.assert_close(whole.values, packed(lora(*factors(6, 2, 5))).values)


def test_two_tensors_of_one_name_are_refused() -> None:
    state = {"x.lora.lora_A": torch.ones(3, 2), "x.weight": torch.ones(2, 2), **named("x.lora_A", "x.lora_B")}
    with pytest.raises(ValueError, match=r"has 'x.lora.lora_A' beside the adapter that is called so; rename one"):
        packed(state)


# ---------------------------------------------------------------------------------------------------------------------
# Modules


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.fc, self.conv, self.head = (
            nn.Embedding(20, 8),
            nn.Linear(8, 6),
            nn.Conv1d(6, 5, 3),
            nn.Linear(5, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.fc(self.emb(x)).mT).mean(-1))


def drawn(network: nn.Module) -> nn.Module:
    """Return a network with all its adapters as if they were trained."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name or "ia3" in name:
                parameter.normal_()
    return network


def adapted(**options) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return drawn(peft.get_peft_model(Module(), peft.LoraConfig(**options)))


def test_a_module_of_peft_has_the_scale_that_it_applies() -> None:
    network = adapted(r=3, lora_alpha=6, target_modules=["emb", "fc", "conv"])
    batch = packed(network)
    layers = [name.rpartition(".")[0] for name in batch.names[0][1]]
    prefix = "base_model.model."
    assert {f"{prefix}{own}" for own in ("emb", "fc", "conv")} <= set(layers)
    assert not skipped_summary(batch) and "adapter" in {reason.partition(":")[0] for _, reason in batch.skipped[0]}
    found, fc = tensors(batch), network.base_model.model.fc
    torch.testing.assert_close(
        found[f"{prefix}fc.lora_B"] @ found[f"{prefix}fc.lora_A"], fc.get_delta_weight("default"), atol=1e-5, rtol=1e-5
    )
    types = dict(zip(batch.names[0][1], batch.tensor_type.tolist(), strict=True))
    assert types[f"{prefix}fc.lora_A"] == LORA_A and types[f"{prefix}fc.base_layer.weight"] == 0
    named_types = dict(zip(batch.names[0][1], packed(network, kinds="names").tensor_type.tolist(), strict=True))
    assert named_types[f"{prefix}conv.lora_B"] == LORA_B


def test_a_gradient_to_the_factors_is_refused_and_values_do_not_depend_on_it() -> None:
    network = adapted(r=3, lora_alpha=6, target_modules=["fc"])
    batch = packed(network)
    assert batch.values.requires_grad
    with torch.no_grad():
        assert torch.equal(packed(network).values, batch.values)
    with pytest.raises(
        RuntimeError, match=r"no gradient flows through the canonical form of an adapter; .*\.detach\(\)"
    ):
        batch.values.sum().backward()
    a, b = factors(6, 2, 5)
    with pytest.raises(ValueError, match=r"adapter of 'up' is inside a transform of torch.func"):
        torch.func.grad(lambda a: packed(lora(a, b)).values.sum())(a)


def test_the_kind_of_an_adapter() -> None:
    assert kind_id("adapter") == kind_id("other") and role_of("lora_A", 7) == 5 and role_of("lora_A", 0) == 4
    state = {"x.table": torch.ones(3, 2), **lora(*factors(6, 2, 5))}
    batch = packed(state, kinds={"up": "linear", "x": "adapter"})
    assert sorted(batch.tensor_type.tolist()) == [4, 4, 60]


def test_roles_of_adapters_count_as_other_in_tables_of_statistics() -> None:
    from sne_fast.zoo.statistics import layer_statistics

    table = layer_statistics(pack([lora(*factors(6, 2, 5))]))
    assert table.shape == (1, 7 * 5 * 3 + 21)
