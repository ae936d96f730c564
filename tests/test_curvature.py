"""Curvature: products against dense Hessians, eigenpairs against eigh, planes restored bit for bit, PyHessian as the peer."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from valuecot.curvature import (
    LossHessian,
    MatrixOperator,
    adaptive_sharpness,
    both_ends,
    eigenplane,
    hutchinson_trace,
    measure,
    plane_radius,
    pyhessian_eigenpairs,
    quadratic,
    spectral_density,
    three_point_curvature,
    top_eigenpairs,
)
from valuecot.curvature.examples import bucket
from valuecot.curvature.krylov import READINGS, ranking
from valuecot.curvature.operators import views

data = Path(__file__).parents[2] / "shared" / "data"


def llama(tied: bool) -> LlamaForCausalLM:
    shape = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1, tie_word_embeddings=tied, initializer_range=0.4, attention_dropout=0.1))


def qwen(tied: bool) -> Qwen3_5ForCausalLM:
    shape = {"vocab_size": 11, "hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    linear = {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 2, "linear_value_head_dim": 2}
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**shape, **linear, **layers, tie_word_embeddings=tied, initializer_range=0.4))


def texts() -> list[dict]:
    "Four sequences of different length; one with a masked prompt, one with a gap and an unscored tail."
    generator = torch.Generator().manual_seed(3)
    examples = [{"input_ids": (ids := torch.randint(11, (length,), generator=generator)), "labels": ids.clone()} for length in (4, 9, 7, 6)]
    examples[1]["labels"][:5] = -100
    examples[2]["labels"][[2, 5, 6]] = -100
    return examples


def plain_loss(model, examples, reduction="token"):
    "The loss written down naively: one example at a time, no padding, no selection."
    sums, counts = [], []
    for example in examples:
        logits = model(input_ids=example["input_ids"][None]).logits[0]
        targets = example["labels"][1:]
        sums.append(F.cross_entropy(logits[:-1], targets, ignore_index=-100, reduction="sum"))
        counts.append(int((targets != -100).sum()))
    if reduction == "token":
        return torch.stack(sums).sum() / sum(counts)
    return torch.stack([s / c for s, c in zip(sums, counts, strict=True)]).mean()


def dense_hessian(model, examples, reduction="token"):
    "Gradient and every row of the Hessian, on a copy."
    model = copy.deepcopy(model).eval()
    model.set_attn_implementation("eager")
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(plain_loss(model, examples, reduction), parameters, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])
    rows = torch.autograd.grad(flat, parameters, torch.eye(len(flat)), is_grads_batched=True, materialize_grads=True)
    return flat.detach(), torch.cat([r.flatten(1) for r in rows], 1)


@pytest.fixture(
    scope="module", params=[("llama", True), ("llama", False), ("qwen", True), ("qwen", False)], ids=lambda p: f"{p[0]}-{'tied' if p[1] else 'untied'}"
)
def small(request):
    torch.manual_seed(1)
    model = {"llama": llama, "qwen": qwen}[request.param[0]](request.param[1])
    gradient, hessian = dense_hessian(model, texts())
    return model, gradient, hessian


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return llama(True)


@pytest.fixture(scope="module")
def trained():
    "A Llama that has half learned its texts: a loss whose eigenvalues stand apart."
    torch.manual_seed(0)
    model = llama(True)
    H = LossHessian(model, texts())
    for _ in range(40):
        gradient = H.gradient()
        with torch.no_grad():
            for p, g in zip(H.parameters, views(gradient, H.parameters), strict=True):
                p -= 0.2 * g
    return model


def vector(n: int, seed: int = 0) -> torch.Tensor:
    v = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return v / v.norm()


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return float((a - b).norm()) <= tolerance * float(b.norm())


# products


def test_products_equal_the_dense_hessian(small):
    model, gradient, hessian = small
    H = LossHessian(model, texts(), token_budget=16)
    assert H.n == len(gradient) == sum(p.numel() for p in model.parameters()) < 3000
    for seed in range(3):
        v = vector(H.n, seed)
        assert close(H @ v, hessian @ v, 1e-5)
    assert (H @ vector(H.n)).dtype == torch.float32 and H.products == 4
    assert close(H.gradient(), gradient, 1e-5)
    assert H.loss == pytest.approx(plain_loss(copy.deepcopy(model).eval(), texts()).item(), rel=1e-5)


def test_products_are_symmetric(small):
    H = LossHessian(small[0], texts())
    u, v = vector(H.n, 1), vector(H.n, 2)
    assert float(u @ (H @ v)) == pytest.approx(float(v @ (H @ u)), rel=1e-4, abs=1e-6)


def test_products_equal_a_difference_of_gradients(small):
    model, _, hessian = small
    H, v = LossHessian(model, texts()), torch.linalg.eigh(small[2])[1][:, -1]
    sides = []
    for side in (1e-3, -1e-3):
        moved = copy.deepcopy(model)
        there = LossHessian(moved, texts())
        with torch.no_grad():
            for p, d in zip(there.parameters, views(v, there.parameters), strict=True):
                p += side * d
        sides.append(there.gradient())
    assert close((sides[0] - sides[1]) / 2e-3, H @ v, 1e-2)


@pytest.mark.parametrize("reduction", ["token", "example"])
def test_batches_order_and_padding_change_nothing(small, reduction):
    examples, model = texts(), small[0]
    H = LossHessian(model, examples, reduction)
    v = vector(H.n)
    expected = H @ v
    for budget in (1, 10, 18, 10_000):
        assert close(LossHessian(model, examples[::-1], reduction, token_budget=budget) @ v, expected, 1e-5)
    longer = [{"input_ids": F.pad(e["input_ids"], (0, 3), value=5), "labels": F.pad(e["labels"], (0, 3), value=-100)} for e in examples]
    padded = LossHessian(model, longer, reduction)
    assert close(padded @ v, expected, 1e-5)
    assert padded.loss == pytest.approx(H.loss, rel=1e-6)
    assert padded.fingerprint == H.fingerprint


def test_the_first_label_never_counts(model):
    examples = texts()
    other = [{**e, "labels": torch.cat([torch.tensor([-100]), e["labels"][1:]])} for e in examples]
    assert LossHessian(model, other).loss == LossHessian(model, examples).loss
    assert LossHessian(model, other).fingerprint == LossHessian(model, examples).fingerprint


def test_reductions_by_hand(model):
    examples = texts()
    single = [LossHessian(model, [e]) for e in examples]
    counts = torch.tensor([float(h.counts) for h in single], dtype=torch.float64)
    losses = torch.tensor([h.loss for h in single], dtype=torch.float64)
    token, example = LossHessian(model, examples), LossHessian(model, examples, "example")
    assert token.loss == pytest.approx(float((losses * counts).sum() / counts.sum()), rel=1e-6)
    assert example.loss == pytest.approx(float(losses.mean()), rel=1e-6)
    v = vector(token.n)
    products = torch.stack([h @ v for h in single])
    assert close(token @ v, ((counts / counts.sum()) @ products.double()).float(), 1e-5)
    assert close(example @ v, products.mean(0), 1e-5)
    assert token.fingerprint != example.fingerprint


def test_example_reduction_equals_the_dense_hessian():
    torch.manual_seed(2)
    model = llama(False)
    _, hessian = dense_hessian(model, texts(), "example")
    v = vector(len(hessian))
    assert close(LossHessian(model, texts(), "example") @ v, hessian @ v, 1e-5)


def test_only_trainable_parameters_make_up_theta(small):
    model, _, hessian = small
    frozen = copy.deepcopy(model)
    keep = [name.endswith("proj.weight") for name, _ in frozen.named_parameters()]
    mask = torch.cat([torch.full((p.numel(),), k) for p, k in zip(frozen.parameters(), keep, strict=True)])
    for p, k in zip(frozen.parameters(), keep, strict=True):
        p.requires_grad_(k)
    H = LossHessian(frozen, texts())
    v = vector(H.n)
    assert H.n == int(mask.sum()) < len(mask)
    assert close(H @ v, hessian[mask][:, mask] @ v, 1e-5)


def test_a_parameter_that_the_loss_ignores_has_no_curvature(model):
    extended = copy.deepcopy(model)
    extended.idle = torch.nn.Parameter(torch.ones(3))
    H = LossHessian(extended, texts())
    place = [name for name, _ in extended.named_parameters()].index("idle")
    assert views(H @ vector(H.n), H.parameters)[place].abs().sum() == 0


def test_the_model_is_left_as_it_was(small):
    model = copy.deepcopy(small[0])
    model.train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    grads = [torch.full_like(p, 7.0) for p in model.parameters()]
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g
    state, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    H = LossHessian(model, texts())
    with torch.no_grad():
        first, second = H @ vector(H.n), H @ vector(H.n)  # dropout would tell them apart
    assert torch.equal(first, second)
    measure(model, texts(), probes=2, max_matvecs=10)
    assert [m.training for m in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"
    assert all(p.grad is g and (g == 7).all() for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_mode_and_attention_come_back_after_an_error(model):
    broken = copy.deepcopy(model).train()
    H = LossHessian(broken, texts())

    def fail(*_):
        assert not broken.training and broken.config._attn_implementation == "eager"
        raise RuntimeError("out of memory")

    broken.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        H @ vector(H.n)
    assert broken.training and broken.config._attn_implementation == "sdpa"


def test_a_model_without_logits_to_keep(model):
    class Bare(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, attention_mask, use_cache):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    H = LossHessian(model, texts())
    assert close(LossHessian(Bare(model), texts()) @ vector(H.n), H @ vector(H.n), 1e-6)


def test_buckets_hold_every_row_once_within_the_budget():
    lengths = [5, 100, 3, 30, 31, 7, 99]
    groups = bucket(lengths, 120)
    assert sorted(sum(groups, [])) == list(range(7))
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 120 for g in groups)


# what is refused


def without(key):
    return [{k: v for k, v in e.items() if k != key} for e in texts()]


@pytest.mark.parametrize(
    "examples, options, match",
    [
        ([], {}, "no examples"),
        ([*texts(), {"input_ids": torch.arange(4), "labels": torch.tensor([1, -100, -100, -100])}], {}, "example 4 has no scored token"),
        ([*texts(), {"input_ids": torch.arange(1), "labels": torch.arange(1)}], {}, "example 4 has no scored token"),
        ([{"input_ids": torch.arange(4), "labels": torch.arange(3)}], {}, r"example 0: input_ids \(4,\) and labels \(3,\)"),
        ([{"input_ids": torch.arange(4)[None], "labels": torch.arange(4)[None]}], {}, "one row each"),
        ([{"input_ids": torch.arange(4), "labels": torch.tensor([0, 1, -1, 2])}], {}, "negative token"),
        ([{"input_ids": torch.arange(40), "labels": torch.arange(40)}], {}, "token 39, the model knows 11"),
        (without("labels"), {}, "example 0 has no labels"),
        (texts(), {"reduction": "mean"}, 'use "token" or "example"'),
        (texts(), {"token_budget": 0}, "token_budget must be positive"),
    ],
)
def test_bad_examples(model, examples, options, match):
    with pytest.raises(ValueError, match=match):
        LossHessian(model, examples, **options)


def test_bad_models(model):
    with pytest.raises(ValueError, match=r"call model.float\(\)"):
        LossHessian(copy.deepcopy(model).bfloat16(), texts())
    with pytest.raises(ValueError, match="no trainable parameter"):
        LossHessian(copy.deepcopy(model).requires_grad_(False), texts())


@pytest.mark.parametrize("shape", [(3,), (1, 2), ()])
def test_bad_vectors(model, shape):
    with pytest.raises(ValueError, match="v has shape"):
        LossHessian(model, texts()) @ torch.zeros(shape)


def test_a_loss_that_is_not_finite_names_the_example(model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.embed_tokens.weight[9] = float("nan")
    examples = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([1, 2, 3], [1, 2, 3, 4, 5], [2, 9, 3, 1])]
    untied = LossHessian(broken, examples)
    untied.model.lm_head.weight = torch.nn.Parameter(torch.nan_to_num(broken.lm_head.weight.detach()))  # the token poisons only what reads it
    for act in (lambda: untied.loss, untied.gradient, lambda: untied @ torch.ones(untied.n)):
        with pytest.raises(ValueError, match="example 2 has loss nan, 1 of 3 such"):
            act()


# eigenpairs

spectra = {
    "random": torch.randn(40, generator=torch.Generator().manual_seed(5)).tolist(),
    "negative": [-1.0, -2.0, -3.0, -10.0, -4.0, -7.0],
    "clustered": [10.0, 9.99, 9.9] + [i / 30 for i in range(30)],
    "repeated": [5.0, 5.0, 3.0] + [i / 50 for i in range(60)] + [-4.0, -4.0],
    "few values": [2.0] * 10 + [-2.0] * 5 + [1.0] * 10,
    "identity": [1.0] * 20,
    "zero": [0.0] * 8,
    "rank 1": [4.0] + [0.0] * 20,
    "rank 1, negative": [-4.0] + [0.0] * 20,
    "n = 1": [3.0],
    "n = 2": [1.0, -2.0],
    "n = 3": [1.0, 1.0, -2.0],
    "tiny": [1e-8 * x for x in (3, 2, 1, 0.5, -1)],
    "wide": [1e8, 1e3, 1.0, 0.0, -1e7],
}


def matrix(values: list[float], seed: int = 0) -> MatrixOperator:
    "A symmetric matrix with these eigenvalues and random eigenvectors."
    n = len(values)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    A = (Q * torch.tensor(values, dtype=torch.float64)) @ Q.T
    return MatrixOperator((A + A.T) / 2)


@pytest.mark.parametrize("which", READINGS)
@pytest.mark.parametrize("name, k", [(name, k) for name in spectra for k in (1, 2, 3) if k <= len(spectra[name])])
def test_known_spectra(name, which, k):
    values = torch.tensor(spectra[name], dtype=torch.float64)
    H = matrix(spectra[name])
    found = top_eigenpairs(H, k=k, which=which)
    expected = values[ranking(values, which, k)][:k]
    scale = float(values.abs().max())
    if which == "magnitude":  # of two equal sizes either sign may come first
        expected, got = expected.abs(), found.eigenvalues.abs()
    else:
        got = found.eigenvalues
    assert float((got - expected).abs().max()) <= 1e-3 * scale
    assert found.converged.all() and float(found.residuals.max()) <= 1e-3
    assert found.matvecs == H.products <= 200
    assert close(found.eigenvectors @ found.eigenvectors.T, torch.eye(k), 1e-5)
    assert found.eigenvectors.dtype == torch.float32


@pytest.mark.parametrize("which", READINGS)
def test_eigenvectors_against_eigh(which):
    H = matrix(spectra["random"])
    values, vectors = torch.linalg.eigh(H.matrix)
    order = ranking(values, which, 3)[:3]
    found = top_eigenpairs(H, k=3, tol=1e-5, which=which)
    assert torch.allclose(found.eigenvalues, values[order], rtol=1e-6)
    assert torch.allclose((found.eigenvectors.double() @ vectors[:, order]).abs().diag(), torch.ones(3).double(), atol=1e-6)
    assert found.next_value == pytest.approx(float(values[ranking(values, which, 3)][3]), rel=0.1)


class Columns:
    "A float32 matrix as products, symmetric or not."

    device = torch.device("cpu")

    def __init__(self, A):
        self.A, self.n, self.products = A.float(), len(A), 0

    def __matmul__(self, v):
        self.products += 1
        return self.A @ v


def fresh_residuals(H, found) -> list[float]:
    "By one product more for each pair."
    return [float((H @ v - value * v).norm() / value.abs()) for v, value in zip(found.eigenvectors, found.eigenvalues, strict=True)]


@pytest.mark.parametrize("basis", [None, 5])
@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-5])
def test_residuals_are_measured(monkeypatch, tol, basis):
    monkeypatch.setattr("valuecot.curvature.eigen.SMALL", 0)  # restarts, as for a large model
    H = Columns(matrix(spectra["random"]).matrix)
    found = top_eigenpairs(H, tol=tol, basis=basis)
    assert found.converged.all() and found.matvecs == found.exact_matvecs == H.products
    assert found.residuals.tolist() == pytest.approx(fresh_residuals(H, found), rel=1e-2, abs=1e-6)
    assert found.error_bounds.tolist() == pytest.approx((found.residuals * found.eigenvalues.abs()).tolist())


class Noisy(Columns):
    "Products that are off by a part in a thousand, each in its own direction."

    def __matmul__(self, v):
        image = super().__matmul__(v)
        noise = torch.randn(self.n, generator=torch.Generator().manual_seed(self.products))
        return image + 3e-3 * image.norm() * noise / noise.norm()


class Coarse(Columns):
    "Products of rounded vectors, which is not linear."

    def __matmul__(self, v):
        return super().__matmul__(v.bfloat16().float()).bfloat16().float()


@pytest.mark.parametrize("kind", [Noisy, Coarse])
def test_what_is_wrong_with_the_products_themselves_shows_in_the_residual(kind):
    "The search's own estimate cannot see it: it is made of the same products."
    Q = torch.linalg.qr(torch.randn(700, 700, generator=torch.Generator().manual_seed(0)))[0]
    H = kind((Q * torch.cat([torch.tensor([20.0, 12.0]), torch.linspace(-1, 5, 698)])) @ Q.T)
    found = top_eigenpairs(H)
    assert max(fresh_residuals(H, found)) < 4 * float(found.residuals.max())
    assert kind is Coarse or not found.converged.all()


def test_products_that_are_not_symmetric_show_in_the_residual():
    A = matrix(spectra["random"]).matrix
    noise = torch.randn(A.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    H = Columns(A + 0.02 * (noise - noise.T))
    found = top_eigenpairs(H)
    assert not found.converged.all() and found.residuals.max() > 1e-3
    assert found.residuals.tolist() == pytest.approx(fresh_residuals(H, found), rel=1e-2)


def diagonal(values: list[float], n: int, spread: float, seed: int) -> Columns:
    "Some values, and a bulk around zero."

    class Diagonal(Columns):
        def __init__(self):
            rest = torch.randn(n - len(values), generator=torch.Generator().manual_seed(seed)) * spread
            self.n, self.products, self.values = n, 0, torch.cat([torch.tensor(values), rest])

        def __matmul__(self, v):
            self.products += 1
            return self.values * v

    return Diagonal()


@pytest.mark.parametrize("seed", range(12))
def test_a_ritz_value_that_passes_zero_is_not_taken_for_an_end(seed):
    H = diagonal([26.0, 20.0, 15.0, 10.0, 8.0, 6.0, 4.0, 3.0, 2.0, -0.2], 5000, 1e-3, seed)
    _, smallest = both_ends(H, seed=seed)
    assert smallest.converged.all() and smallest.eigenvalues.tolist() == pytest.approx([-0.2], rel=1e-2)
    top = top_eigenpairs(diagonal([1.0, 0.7, 0.5, -1e4], 5000, 1e-3, seed), seed=seed)
    assert top.eigenvalues.tolist() == pytest.approx([1.0, 0.7], rel=1e-2) or not top.converged.all()


def test_close_values_need_a_second_look():
    "Above 512 parameters a pair closer than the tolerance may count as one, as the docstring says."
    once, twice = ([top_eigenpairs(diagonal([10.0, 9.999, 8.0], 3000, 1.0, s), seed=s, second_look=look).eigenvalues[1] for s in range(6)] for look in (False, True))
    assert all(float(x) == pytest.approx(9.999, rel=2e-3) for x in twice)
    assert any(float(x) == pytest.approx(8.0, rel=2e-3) for x in once)


def test_the_next_value_is_remembered_where_the_search_goes_on():
    found = top_eigenpairs(diagonal([20.0, 12.0, 11.9], 5000, 0.1, 0), tol=3e-8)
    assert found.next_value == pytest.approx(11.9, rel=1e-2) and any("within 5 %" in w for w in found.warnings)


@pytest.mark.parametrize("options, said", [
    ({"basis": 1}, "too few vectors"), ({"basis": 0}, "too few vectors"), ({"basis": -4}, "too few vectors"), ({"basis": 4}, "too few vectors"),
    ({"tol_smallest": 0.0}, "tol_smallest"), ({"tol_smallest": float("nan")}, "tol_smallest"), ({"k": 2.0}, "whole number"), ({"max_matvecs": 7.5}, "whole number"),
    ({"tol": float("inf")}, "tol must be positive"), ({"max_matvecs": 5}, "too small"),
])  # fmt: skip
def test_both_ends_refuse_what_cannot_be_asked(options, said):
    with pytest.raises(ValueError, match=said):
        both_ends(matrix(spectra["random"]), **options)


def test_a_product_that_is_no_number_ends_the_search():
    H = Columns(torch.full((600, 600), float("nan")))
    with pytest.raises(ArithmeticError, match="inf or nan"):
        top_eigenpairs(H)


def test_every_k_up_to_n():
    H = matrix(spectra["random"][:12])
    exact = torch.linalg.eigvalsh(H.matrix).flip(0)
    for k in range(1, 13):
        assert torch.allclose(top_eigenpairs(H, k=k).eigenvalues, exact[:k], atol=1e-4)


def test_the_seed_decides_everything():
    H = matrix(spectra["random"])
    one, same, other = (top_eigenpairs(H, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.eigenvectors, same.eigenvectors) and one.matvecs == same.matvecs
    assert not torch.equal(one.eigenvectors, other.eigenvectors)
    assert one.seed == 1


def test_the_basis_stays_bounded():
    class Wide:
        n, device = 20_000, torch.device("cpu")
        diagonal = torch.cat([torch.tensor([1.05, 1.02]), torch.linspace(-1, 1, 19_998)])

        def __matmul__(self, v):
            return self.diagonal * v

    found = top_eigenpairs(Wide(), max_matvecs=300)
    assert found.converged.all() and found.matvecs > 20  # so it restarted
    assert found.eigenvalues.tolist() == pytest.approx([1.05, 1.02], abs=1e-5)
    assert found.loss != found.loss and found.gradient_norm != found.gradient_norm  # nan: it knows no loss


@pytest.mark.parametrize("which", READINGS)
@pytest.mark.parametrize("name", ["random", "negative", "clustered", "few values", "zero", "rank 1", "n = 3", "wide"])
def test_restarts_find_what_a_full_basis_finds(monkeypatch, name, which):
    monkeypatch.setattr("valuecot.curvature.eigen.SMALL", 0)  # ten vectors, as for a large model
    values = torch.tensor(spectra[name], dtype=torch.float64)
    found = top_eigenpairs(matrix(spectra[name]), which=which)
    assert found.converged.all()
    expected = values[ranking(values, which, 2)][:2]
    got = found.eigenvalues
    if which == "magnitude":  # of two equal sizes either sign may come first
        expected, got = expected.abs(), got.abs()
    assert float((got - expected).abs().max()) <= 1e-3 * float(values.abs().max())


def test_a_spent_budget_says_so():
    H = matrix(spectra["random"])
    found = top_eigenpairs(H, tol=1e-6, max_matvecs=6)
    assert not found.converged.all() and found.matvecs == H.products == 6
    assert any("pair 2 not converged" in w and "after 6 products" in w for w in found.warnings)


class Cheap(MatrixOperator):
    "Products that are wrong by more than the tolerance."

    def __init__(self, matrix, exact):
        super().__init__(matrix)
        self.exact = exact


def test_a_cheap_search_that_goes_no_further_says_so():
    A = torch.diag(torch.linspace(1, 100, 900, dtype=torch.float64))
    noise = torch.randn(900, 900, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = top_eigenpairs(Cheap(A + 3 * (noise + noise.T), MatrixOperator(A)), tol=1e-6, max_matvecs=60)
    assert not found.converged.all() and any("search by cheap products goes no further" in note for note in found.warnings)
    assert not any("cheap" in note for note in top_eigenpairs(MatrixOperator(A), tol=1e-6, max_matvecs=12).warnings)


def test_a_bar_shows_products_and_the_estimated_residual(capsys):
    H = MatrixOperator(torch.diag(torch.linspace(1, 100, 900, dtype=torch.float64)))
    quiet = top_eigenpairs(H)
    assert capsys.readouterr().err == ""
    shown = top_eigenpairs(H, progress=True)
    said = capsys.readouterr().err
    assert "/200" in said and "residual about" in said and torch.equal(shown.eigenvalues, quiet.eigenvalues) and shown.matvecs == quiet.matvecs


def test_a_text_longer_than_the_model_is_refused(model):
    room = model.config.max_position_embeddings
    ids = torch.ones(room + 1, dtype=torch.long)
    LossHessian(model, [{"input_ids": ids, "labels": ids}])  # the last token is only predicted
    long = torch.ones(room + 2, dtype=torch.long)
    with pytest.raises(ValueError, match=f"example 1 reads {room + 1} tokens, the model's max_position_embeddings is {room}"):
        LossHessian(model, [*texts(), {"input_ids": long, "labels": long}][-2:])


def test_a_tolerance_below_float32_ends_early():
    H = matrix(spectra["random"])
    found = top_eigenpairs(H, tol=1e-12)
    assert not found.converged.all() and found.matvecs < 200 and found.residuals.max() < 1e-5


def test_warnings_of_the_plane_and_the_saddle():
    close_third = top_eigenpairs(matrix([5.0, 3.0, 2.95] + [0.1] * 10))
    assert any("within 5 %" in w for w in close_third.warnings)
    saddle = top_eigenpairs(matrix([-5.0, 3.0, 1.0, 0.5]), which="magnitude")
    assert any("saddle" in w for w in saddle.warnings)
    assert top_eigenpairs(matrix([5.0, 3.0, 1.0, 0.5])).warnings == ()


@pytest.mark.parametrize("values", [spectra["random"], spectra["negative"], [3.0, 1.0], [2.0]])
def test_both_ends(values):
    H = matrix(values)
    exact = sorted(values)
    k = min(2, len(values))
    largest, smallest = both_ends(H, k)
    assert largest.eigenvalues.tolist() == pytest.approx(exact[::-1][:k], rel=1e-4)
    assert smallest.eigenvalues.tolist() == pytest.approx(exact[:1], rel=1e-4)
    assert largest.matvecs == smallest.matvecs == H.products
    assert largest.which == "algebraic" and smallest.which == "smallest"


@pytest.mark.parametrize(
    "options, match",
    [
        ({"k": 0}, "1 <= k <= n, got k=0, n=40"),
        ({"k": 41}, "1 <= k <= n, got k=41, n=40"),
        ({"max_matvecs": 3}, "max_matvecs=3 is too small"),
        ({"which": "LA"}, "Did you mean 'algebraic'"),
        ({"which": "LM"}, "Did you mean 'magnitude'"),
        ({"which": "largest"}, "Did you mean 'algebraic'"),
        ({"which": None}, "there are algebraic"),
        ({"which": "algebra"}, "Did you mean 'algebraic'"),
        ({"which": "ends"}, "there are algebraic"),
        ({"tol": 0.0}, "tol must be positive"),
    ],
)
def test_bad_questions(options, match):
    with pytest.raises(ValueError, match=match):
        top_eigenpairs(matrix(spectra["random"]), **options)


def test_a_matrix_must_be_symmetric():
    with pytest.raises(ValueError, match="symmetric"):
        MatrixOperator(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))


def test_a_language_model_against_eigh(small):
    model, gradient, hessian = small
    exact = torch.linalg.eigvalsh(hessian.double())
    H = LossHessian(model, texts())
    found = top_eigenpairs(H, k=2)
    assert found.eigenvalues.tolist() == pytest.approx(exact.flip(0)[:2].tolist(), rel=1e-4)
    assert top_eigenpairs(H, k=1, which="smallest").eigenvalues.tolist() == pytest.approx(exact[:1].tolist(), rel=1e-4)
    assert found.converged.all() and found.loss == H.loss
    assert found.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-5)
    assert found.examples == H.fingerprint and found.reduction == "token"


# the plane


def test_the_plane_of_a_language_model(trained):
    H = LossHessian(trained, texts())
    spectrum = top_eigenpairs(H, tol=1e-4)
    before = [p.detach().clone() for p in H.parameters]
    r = plane_radius(spectrum.lambda_max, rise=0.01)
    land = eigenplane(H, spectrum.eigenvectors, torch.linspace(-r, r, 5), torch.linspace(-r, r, 7))
    assert all(torch.equal(p, q) for p, q in zip(H.parameters, before, strict=True))
    assert land.loss.shape == (5, 7) and float(land.loss[2, 3]) == land.center == H.loss
    model_loss = quadratic(land.alphas, land.betas, land.center, spectrum.eigenvectors @ H.gradient(), spectrum.eigenvalues)
    assert float((model_loss - land.loss).abs().max()) < 0.2 * float((land.loss - land.center).abs().max())
    corner = copy.deepcopy(trained)
    with torch.no_grad():
        moved = LossHessian(corner, texts())
        step = land.alphas[0].float() * spectrum.eigenvectors[0] + land.betas[6].float() * spectrum.eigenvectors[1]
        for p, d in zip(moved.parameters, views(step, moved.parameters), strict=True):
            p += d
    assert float(land.loss[0, 6]) == pytest.approx(moved.loss, rel=1e-5)
    assert land.examples == H.fingerprint


@pytest.mark.parametrize("which", ["magnitude", "algebraic", "smallest"])
def test_three_points_see_the_eigenvalue(trained, which):
    H = LossHessian(trained, texts())
    found = top_eigenpairs(H, k=1, tol=1e-4, which=which)
    curvature, step = three_point_curvature(H, found.eigenvectors[0])
    assert curvature == pytest.approx(float(found.eigenvalues[0]), rel=0.01)
    again, same = three_point_curvature(H, found.eigenvectors[0], step=step)
    assert again == pytest.approx(curvature, rel=1e-3) and same == step


def test_three_points_on_a_bowl():
    bowl = MatrixOperator(torch.diag(torch.tensor([1e4, 1.0, 0.0, -2.0])), gradient=torch.ones(4), loss=3.0)
    for i, expected in enumerate([1e4, 1.0, 0.0, -2.0]):
        assert three_point_curvature(bowl, torch.eye(4)[i])[0] == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("act", ["plane", "three points"])
def test_parameters_come_back_after_an_error(trained, error, act):
    model = copy.deepcopy(trained)
    H, seen = LossHessian(model, texts()), []
    before = [p.detach().clone() for p in H.parameters]

    def fail(*_):
        seen.append(any(not torch.equal(p, q) for p, q in zip(H.parameters, before, strict=True)))
        if len(seen) == 4:
            raise error

    model.lm_head.register_forward_hook(fail)
    vectors = torch.stack([vector(H.n, 0), vector(H.n, 1)])
    vectors[1] -= (vectors[0] @ vectors[1]) * vectors[0]
    vectors[1] /= vectors[1].norm()
    with pytest.raises(type(error)):
        eigenplane(H, vectors, [0.1, 0.2], [0.1, 0.2, 0.3]) if act == "plane" else three_point_curvature(H, vectors[0])
    assert seen[-1]  # it was away from theta when it happened
    assert all(torch.equal(p, q) for p, q in zip(H.parameters, before, strict=True))


def test_a_grid_resumes_where_it_broke_off():
    bowl, saved = MatrixOperator(torch.diag(torch.tensor([4.0, 1.0, 0.5])), gradient=torch.tensor([0.1, 0.2, 0.3]), loss=1.0), torch.full((3, 4), float("nan"))

    def save(i, j, loss):
        saved[i, j] = loss
        if (i, j) == (1, 2):
            raise KeyboardInterrupt

    axes = torch.linspace(-1, 1, 3), torch.linspace(0, 3, 4)
    with pytest.raises(KeyboardInterrupt):
        eigenplane(bowl, torch.eye(3)[:2], *axes, checkpoint=save)
    assert int(saved.isnan().sum()) == 5
    visited = []
    land = eigenplane(bowl, torch.eye(3)[:2], *axes, checkpoint=lambda i, j, loss: visited.append((i, j)), done=saved)
    assert len(visited) == 5 and visited[0] == (1, 3)
    assert torch.allclose(land.loss, quadratic(*axes, 1.0, torch.tensor([0.1, 0.2]), torch.tensor([4.0, 1.0])), atol=1e-6)
    assert int(saved.isnan().sum()) == 5  # the caller's tensor is the caller's


def test_a_loss_that_overflows_stays_infinite():
    class Cliff:
        parameters = [torch.zeros(2)]

        def evaluate(self):
            return float("inf") if self.parameters[0][0] > 1 else 0.5

    land = eigenplane(Cliff(), torch.eye(2), [0.0, 2.0], [0.0])
    assert land.loss.tolist() == [[0.5], [float("inf")]]


@pytest.mark.parametrize(
    "vectors, alphas, options, match",
    [
        (torch.eye(3), [0.0], {}, r"2 eigenvectors \(2, n\), got shape \(3, 3\)"),
        (torch.eye(3)[0], [0.0], {}, "2 eigenvectors"),
        (2 * torch.eye(3)[:2], [0.0], {}, "unit norm, got 2: axes"),
        (torch.eye(3)[[0, 0]], [0.0], {}, "orthogonal"),
        (torch.eye(3)[:2], [0.0, float("nan")], {}, "alphas must be a row of finite distances"),
        (torch.eye(3)[:2], [], {}, "alphas must be a row of finite distances"),
        (torch.eye(3)[:2], [0.0], {"done": torch.zeros(3, 3)}, r"done has shape \(3, 3\), the grid is \(1, 1\)"),
    ],
)
def test_bad_planes(vectors, alphas, options, match):
    with pytest.raises(ValueError, match=match):
        eigenplane(MatrixOperator(torch.eye(3)), vectors, alphas, [0.0], **options)


def test_bad_radius_and_step():
    assert plane_radius(8.0) == 0.5
    with pytest.raises(ValueError, match="positive eigenvalue"):
        plane_radius(-1.0)
    with pytest.raises(ValueError, match="unit norm"):
        three_point_curvature(MatrixOperator(torch.eye(3)), torch.ones(3))
    with pytest.raises(ValueError, match="step must be positive"):
        three_point_curvature(MatrixOperator(torch.eye(3)), torch.eye(3)[0], step=0.0)


# trace and density


def test_trace_within_its_standard_error():
    H = matrix(spectra["random"])
    exact = float(H.matrix.trace())
    for deflate in (None, top_eigenpairs(H, k=3), top_eigenpairs(H, k=3, max_matvecs=6)):  # the last one is not converged: still unbiased
        trace = hutchinson_trace(H, probes=200, deflate=deflate)
        assert abs(trace.mean - exact) < 4 * trace.se and trace.probes == len(trace.samples) == 200
    diagonal = hutchinson_trace(MatrixOperator(torch.diag(torch.arange(5.0))), probes=2)
    assert diagonal.mean == pytest.approx(10) and diagonal.se == pytest.approx(0)  # signs see a diagonal exactly


def test_deflation_of_everything_is_exact():
    H = matrix(spectra["negative"])
    trace = hutchinson_trace(H, probes=2, deflate=top_eigenpairs(H, k=6, tol=1e-5))
    assert trace.mean == pytest.approx(-27, rel=1e-4) and trace.se < 1e-3


def test_the_seed_decides_the_probes():
    H = matrix(spectra["random"])
    assert hutchinson_trace(H, seed=1).mean == hutchinson_trace(H, seed=1).mean != hutchinson_trace(H, seed=2).mean
    assert torch.equal(spectral_density(H, 2, 5).nodes, spectral_density(H, 2, 5).nodes)


@pytest.mark.parametrize("name", ["random", "rank 1", "zero", "identity", "n = 1"])
def test_quadrature_weights_sum_to_one(name):
    H = matrix(spectra[name])
    density = spectral_density(H, probes=3, steps=40)
    assert density.nodes.shape == density.weights.shape == (3, 40)
    assert torch.allclose(density.weights.sum(1), torch.ones(3).double()) and density.matvecs == H.products
    values = torch.tensor(spectra[name])
    assert density.nodes.min() >= values.min() - 1e-4 and density.nodes.max() <= values.max() + 1e-4


def test_density_moments():
    values = torch.linspace(-1, 3, 400).tolist()
    density = spectral_density(matrix(values), probes=8, steps=30)
    for p in (1, 2, 3):
        assert float((density.weights * density.nodes**p).sum(1).mean()) == pytest.approx(float((torch.tensor(values) ** p).mean()), rel=0.1)
    grid = torch.linspace(-3, 5, 2000)
    assert float(density.curve(grid, 0.2).sum() * (grid[1] - grid[0])) == pytest.approx(1, abs=1e-3)


def test_bad_probes():
    H = matrix(spectra["negative"])
    with pytest.raises(ValueError, match="at least 2 probes"):
        hutchinson_trace(H, probes=1)
    with pytest.raises(ValueError, match="another operator"):
        hutchinson_trace(H, deflate=top_eigenpairs(matrix(spectra["random"])))
    with pytest.raises(ValueError, match="at least 1 probe"):
        spectral_density(H, probes=0)


# the report


def test_measure_against_the_dense_hessian(small):
    model, gradient, hessian = small
    report = measure(model, texts(), probes=24)
    values, vectors = torch.linalg.eigh(hessian.double())
    theta = torch.cat([p.detach().flatten() for p in model.parameters()]).double().abs()
    assert report.spectrum.eigenvalues.tolist() == pytest.approx(values.flip(0)[:2].tolist(), rel=1e-4)
    assert report.smallest.eigenvalues.tolist() == pytest.approx(values[:1].tolist(), rel=1e-4)
    assert report.adaptive_sharpness == pytest.approx(float(torch.linalg.eigvalsh(theta[:, None] * hessian.double() * theta)[-1]), rel=1e-4)
    assert abs(report.trace - float(values.sum())) < 4 * report.trace_se
    assert report.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-5)
    assert report.gradient_share == pytest.approx(float((vectors[:, -1] @ gradient.double()) ** 2 / gradient.double().norm() ** 2), abs=1e-3)
    assert report.lambda_over_loss == pytest.approx(float(values[-1]) / report.loss, rel=1e-4)
    assert report.attribution is None and report.matvecs > 24
    assert "adaptive_sharpness" in report._repr_markdown_()


def test_adaptive_sharpness_ignores_rescaling(model):
    other = copy.deepcopy(model)
    mlp = other.model.layers[0].mlp
    with torch.no_grad():
        mlp.up_proj.weight *= 10
        mlp.down_proj.weight /= 10
    one, two = LossHessian(model, texts()), LossHessian(other, texts())
    assert two.loss == pytest.approx(one.loss, rel=1e-5)
    assert float(adaptive_sharpness(two).eigenvalues) == pytest.approx(float(adaptive_sharpness(one).eigenvalues), rel=1e-3)
    assert top_eigenpairs(two, 1).lambda_max > 1.2 * top_eigenpairs(one, 1).lambda_max


# the peer


@pytest.mark.parametrize("reduction, batch_size", [("token", 1), ("token", 3), ("example", 3)])
def test_pyhessian_agrees_when_made_to_go_on(trained, reduction, batch_size):
    ours = top_eigenpairs(LossHessian(trained, texts(), reduction), which="magnitude", tol=1e-5)
    peer = pyhessian_eigenpairs(trained, texts(), max_iterations=300, tol=1e-9, batch_size=batch_size, reduction=reduction)
    assert peer.eigenvalues.tolist() == pytest.approx(ours.eigenvalues.tolist(), rel=1e-3)
    assert float(torch.linalg.svdvals(peer.eigenvectors @ ours.eigenvectors.T).min()) > 0.999
    assert peer.examples == ours.examples and peer.loss == ours.loss


def test_pyhessian_at_its_default_misses_our_residual(trained):
    ours = top_eigenpairs(LossHessian(trained, texts()), which="magnitude")
    peer = pyhessian_eigenpairs(trained, texts())
    assert float(peer.residuals.max()) > 1e-3 >= float(ours.residuals.max())
    assert any("PyHessian stopped" in w for w in peer.warnings)


def test_pyhessian_is_seeded_counted_and_leaves_no_trace(trained):
    model = copy.deepcopy(trained).train()
    grads = [torch.ones_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    state = torch.get_rng_state()
    one = pyhessian_eigenpairs(model, texts(), k=1, max_iterations=4, tol=1e-12, batch_size=4)
    assert one.matvecs == 4
    assert sum(calls) == 4 + 1 + 1  # its products, our measuring product, our gradient: one batch each
    torch.manual_seed(99)
    two = pyhessian_eigenpairs(model, texts(), k=1, max_iterations=4, tol=1e-12, batch_size=4)
    assert torch.equal(one.eigenvectors, two.eigenvectors)
    torch.set_rng_state(state)
    pyhessian_eigenpairs(model, texts(), k=1, max_iterations=2)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and model.config._attn_implementation == "sdpa"
    assert all(p.grad is g and (g == 1).all() for p, g in zip(model.parameters(), grads, strict=True))


def test_bad_peer_questions(trained):
    with pytest.raises(ValueError, match="max_iterations=1 is too small"):
        pyhessian_eigenpairs(trained, texts(), max_iterations=1)
    with pytest.raises(ValueError, match="1 <= k <= n, got k=0"):
        pyhessian_eigenpairs(trained, texts(), k=0)


# on real text, and at the door


@pytest.mark.skipif(not (data / "lm_stories260K").exists(), reason="needs shared/data/lm_stories260K beside the checkout")
def test_stories_within_eighteen_products():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(data / "lm_stories260K")
    tokenizer = AutoTokenizer.from_pretrained(data / "lm_stories260K")
    stories = json.loads((data / "tinystories" / "tinystories_1000.json").read_text())[:20]
    rows = [torch.tensor(tokenizer(s.replace("\n\n", "\n"))["input_ids"][:64]) for s in stories]
    H = LossHessian(model, [{"input_ids": ids, "labels": ids} for ids in rows])
    found = top_eigenpairs(H)
    assert found.converged.all() and float(found.residuals.max()) <= 1e-3
    assert found.matvecs == H.products <= 18
    assert found.eigenvalues.tolist() == pytest.approx([50.3656, 37.2123], rel=1e-3)
    for value, v in zip(found.eigenvalues, found.eigenvectors, strict=True):
        assert three_point_curvature(H, v)[0] == pytest.approx(float(value), rel=0.01)


def test_importing_is_cheap():
    probe = "import sys, valuecot.curvature; print([m for m in ('transformers', 'pyhessian', 'matplotlib', 'pandas', 'trl') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.strip() == "[]"
