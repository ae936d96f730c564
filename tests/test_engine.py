"""The curvature engine: float64 oracles, cheap products under an exact certificate, memory, faults, processes."""

import copy
import math
import os
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_curvature import close, llama, qwen, texts, vector
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from valuecot.curvature import (
    EmpiricalFisher,
    GaussNewton,
    Hosted,
    LossHessian,
    MatrixOperator,
    attribute,
    block_sharpness,
    both_ends,
    eigenplane,
    hutchinson_trace,
    measure,
    overlaps,
    spectral_density,
    top_eigenpairs,
)
from valuecot.curvature import loss as loss_module
from valuecot.curvature.attribution import token_curvature
from valuecot.curvature.hessian import graph_bytes, movable
from valuecot.curvature.operators import views
from valuecot.curvature.peers import loader
from valuecot.curvature.plane import filter_normalized, loss_plane, plane_preview, slope_and_curvature
from valuecot.curvature.planner import Live, predict
from valuecot.curvature.sharpness import adaptive_sharpness, blocks


class Float64(TorchFunctionMode):
    "transformers computes norms, rotary angles and softmax in float32 even for a float64 model: redirect those casts."

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double() if args[0].is_floating_point() else args[0].float()
        if func is torch.Tensor.to:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def rows_of(outputs, parameters):
    "Jacobian (outputs, n), 256 rows at a time."
    parts = []
    for rows in torch.eye(len(outputs), dtype=outputs.dtype).split(256):
        found = torch.autograd.grad(outputs, parameters, rows, is_grads_batched=True, retain_graph=True, materialize_grads=True)
        parts.append(torch.cat([g.flatten(1) for g in found], 1))
    return torch.cat(parts)


FAMILIES = [("llama", True), ("llama", False), ("qwen", True), ("qwen", False)]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda p: f"{p[0]}-{'tied' if p[1] else 'untied'}")
def oracle(request):
    "A float64 model, its dense Hessian, Gauss-Newton matrix and token gradients, each written down one example at a time."
    torch.manual_seed(1)
    model = {"llama": llama, "qwen": qwen}[request.param[0]](request.param[1]).double().eval()
    assert sum(p.numel() for p in model.parameters()) < 3000
    model.set_attn_implementation("eager")
    parameters, H, G, slopes, total = list(model.parameters()), 0, 0, [], 0
    with Float64():
        for example in texts():
            scored = (example["labels"][1:] != -100).nonzero()[:, 0]
            targets = example["labels"][1:][scored]
            logits = model(input_ids=example["input_ids"][None]).logits[0, scored]
            losses = F.cross_entropy(logits, targets, reduction="none")
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(losses.sum(), parameters, create_graph=True, materialize_grads=True)])
            H = H + rows_of(gradient, parameters)
            slopes.append(rows_of(losses, parameters))
            J = rows_of(logits.flatten(), parameters).view(*logits.shape, -1)
            p = torch.softmax(logits.detach(), -1)
            G = G + torch.einsum("svn,svw,swm->nm", J, torch.diag_embed(p) - p[:, :, None] * p[:, None], J)
            total += len(targets)
    slopes = torch.cat(slopes)
    return model, H / total, G / total, slopes.T @ slopes / total


# ------------------------------------------------------------------------- products


def test_products_are_exact_in_float64(oracle):
    model, H, G, E = oracle
    v = vector(len(H)).double()
    with Float64():
        for operator, matrix in ((LossHessian(model, texts()), H), (GaussNewton(model, texts()), G), (EmpiricalFisher(model, texts()), E)):
            assert operator.head is not None and (operator @ v).dtype == torch.float64
            assert close(operator @ v, matrix @ v, 1e-10), type(operator).__name__


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep": 1 << 40}, {"chunk": 1}, {"chunk": 40}, {"token_budget": 1}, {"token_budget": 13}], ids=str)
def test_products_do_not_depend_on_how_they_are_computed(oracle, options):
    model, H, _, _ = oracle
    v = vector(len(H)).double()
    with Float64():
        operator = LossHessian(model, texts()[::-1], **options)
        assert close(operator @ v, H @ v, 1e-10) and close(operator @ v, H @ v, 1e-10), "the second product uses what the first kept"


def test_products_through_the_models_own_logits(oracle):
    "What happens to a model whose head is not one matrix."
    model, H, G, E = oracle
    v = vector(len(H)).double()
    with Float64():
        for kind, matrix in ((LossHessian, H), (GaussNewton, G), (EmpiricalFisher, E)):
            operator = kind(model, texts())
            operator.head = None
            assert close(operator @ v, matrix @ v, 1e-10)


def test_a_head_that_bends_its_logits_is_not_trusted():
    torch.manual_seed(1)
    model = llama(False)
    model.lm_head = torch.nn.Linear(8, 11, bias=True)
    torch.nn.init.normal_(model.lm_head.bias)
    assert LossHessian(model, texts()).head is None
    model = llama(False)
    plain = model.forward

    def capped(*args, logits_to_keep=0, **kwargs):
        out = plain(*args, logits_to_keep=logits_to_keep, **kwargs)
        out.logits = 2 * torch.tanh(out.logits / 2)
        return out

    model.forward = capped
    assert LossHessian(model, texts()).head is None


def test_blocks_are_blocks(oracle):
    model, H, G, _ = oracle
    with Float64():
        whole = LossHessian(model, texts())
        for by in ("layer", "kind"):
            parts = blocks(model, by)
            assert sorted(n for names in parts.values() for n in names) == sorted(whole.named)
            for names in parts.values():
                at = torch.cat([torch.full((p.numel(),), name in names) for name, p in whole.named.items()])
                part = LossHessian(model, texts(), parameters=names)
                v = vector(part.n, 2).double()
                assert close(part @ v, H[at][:, at] @ v, 1e-10) and close(GaussNewton(model, texts(), parameters=names) @ v, G[at][:, at] @ v, 1e-10)


def test_patterns_choose_and_exclude():
    model = llama(True)
    named = LossHessian(model, texts(), parameters=["*", "!*embed*", "!*norm*"]).named
    assert named and not any("embed" in n or "norm" in n for n in named)
    with pytest.raises(ValueError, match="no trained parameter is called"):
        LossHessian(model, texts(), parameters=["*expert*"])
    with pytest.raises(ValueError, match="leave no parameter"):
        LossHessian(model, texts(), parameters=["*mlp*", "!*"])


def test_eigenpairs_trace_and_density_of_the_oracle(oracle):
    model, H, _, _ = oracle
    values = torch.linalg.eigvalsh(H)
    with Float64():
        operator = LossHessian(model, texts())
        largest, smallest = both_ends(operator, k=2, tol=1e-6, tol_smallest=1e-6, max_matvecs=4000)
        assert largest.converged.all() and smallest.converged.all()
        assert largest.eigenvalues.tolist() == pytest.approx(values.flip(0)[:2].tolist(), rel=1e-9)
        assert float(smallest.eigenvalues) == pytest.approx(float(values[0]), rel=1e-9)
        trace = hutchinson_trace(operator, probes=64, deflate=largest)
        assert abs(trace.mean - float(values.sum())) < 4 * trace.se
        density = spectral_density(operator, probes=8, steps=10)
    first = (density.nodes * density.weights).sum(1) * len(values)  # each probe's quadrature integrates lambda exactly: z'Hz
    assert abs(float(first.mean()) - float(values.sum())) < 4 * float(first.std()) / math.sqrt(8)


# ------------------------------------------------------------------------- kept graphs


@pytest.fixture
def model():
    torch.manual_seed(1)
    return llama(True)


def test_kept_graphs_are_void_once_a_parameter_moves(model):
    H, v = LossHessian(model, texts()), vector(600)[: sum(p.numel() for p in model.parameters())]
    before = H @ v
    held = H.graphs.of(H.batches[0])
    assert H.graphs.held > 0 and (H @ v).equal(before) and H.graphs.of(H.batches[0]) is held
    with torch.no_grad():
        model.model.norm.weight.add_(0.5)
    assert close(H @ v, LossHessian(model, texts(), keep=0) @ v, 1e-6) and H.graphs.of(H.batches[0]) is not held
    H.release()
    assert H.graphs.held == 0 and not H.graphs.kept


@pytest.mark.parametrize("write", [lambda p: p.mul_(3.0), lambda p: p.data.mul_(3.0)], ids=["in place", "through .data"])
@pytest.mark.parametrize("method", ["exact", "forward-difference"])
def test_any_weight_that_moves_voids_what_is_kept(model, write, method):
    "Also one that is no direction of this operator, and one that autograd was not told of."
    H = LossHessian(model, texts(), parameters=["model.layers.0.*"], method=method)
    v = vector(H.n)
    before = H @ v
    with torch.no_grad():
        write(model.model.embed_tokens.weight)
    fresh = LossHessian(model, texts(), parameters=["model.layers.0.*"]) @ v
    assert close(H @ v, fresh, 3e-2 if method == "forward-difference" else 1e-6) and not close(before, fresh, 0.1)


def test_two_operators_move_one_model_in_turn(model):
    one, two = (LossHessian(model, texts(), parameters=[pattern]) for pattern in ("*attn*", "*mlp*"))
    v, w = vector(one.n), vector(two.n)
    expected = two @ w
    eigenplane(one, torch.linalg.qr(torch.stack([v, vector(one.n, 1)]).T)[0].T.contiguous(), [-0.1, 0.1], [0.1])
    assert close(two @ w, expected, 1e-6) and close(one @ v, LossHessian(model, texts(), parameters=["*attn*"]) @ v, 1e-6)


def test_twins_never_hold_graphs_at_once(model):
    cheap = LossHessian(model, texts(), precision="bfloat16")
    v = vector(cheap.n)
    cheap @ v
    assert cheap.graphs.held > 0
    exact = cheap.exact
    assert close(exact @ v, LossHessian(model, texts()) @ v, 1e-6)
    assert exact.graphs.held > 0 and cheap.graphs.held == 0
    cheap @ v
    assert exact.graphs.held == 0
    exact @ v
    cheap.release()
    assert exact.graphs.held == 0
    far = LossHessian(model, texts(), method="difference")
    far.exact @ v
    assert far.exact.graphs.held == 0, "who asks for differences has no room for graphs"
    alone, gone = far.exact, weakref.ref(far)
    del far
    assert gone() is None, "no circle of references keeps graphs alive"
    assert close(alone @ v, exact @ v, 1e-6)


@pytest.mark.parametrize("kind", [GaussNewton, EmpiricalFisher])
def test_a_search_in_low_precision_is_certified_in_full(model, kind):
    cheap, full = kind(model, texts(), precision="bfloat16"), kind(model, texts())
    s = top_eigenpairs(cheap, tol=1e-3)
    measured = torch.stack([full @ v for v in s.eigenvectors]) - s.eigenvalues[:, None].float() * s.eigenvectors
    assert cheap.exact.precision == "float32" and 0 < s.exact_matvecs < s.matvecs
    assert (measured.norm(dim=1) / s.eigenvalues.abs()).tolist() == pytest.approx(s.residuals.tolist(), abs=2e-5)


def test_only_as_many_graphs_are_kept_as_are_allowed(model):
    free = LossHessian(model, texts(), token_budget=1)
    v = vector(free.n)
    expected = free @ v
    sizes = free.graphs.held
    some = LossHessian(model, texts(), token_budget=1, keep=sizes // 2)
    assert close(some @ v, expected, 1e-6) and close(some @ v, expected, 1e-6)
    assert 0 < len(some.graphs.kept) < len(some.batches) and some.graphs.held <= sizes // 2
    none = LossHessian(model, texts(), keep=0)
    assert close(none @ v, expected, 1e-6) and not none.graphs.kept


def test_graph_bytes_counts_each_saved_tensor_once():
    x = torch.ones(1000, requires_grad=True)
    y = (x * x).exp() * x.detach()[:1]
    assert graph_bytes([y], [x]) == 4000 * 1, "exp saves its result; x is known"
    assert graph_bytes([y, y], [x]) == 4000


# ------------------------------------------------------------------------- cheap products, certified


@pytest.mark.parametrize("options", [{"method": "difference"}, {"method": "forward-difference"}, {"precision": "bfloat16"}], ids=lambda o: next(iter(o.values())))
def test_cheap_searches_end_in_an_exact_certificate(options):
    torch.manual_seed(0)
    model = llama(True)
    H = LossHessian(model, texts())
    exact = top_eigenpairs(H, tol=1e-5)
    cheap = LossHessian(model, texts(), **options)
    before = [p.clone() for p in model.parameters()]
    found = top_eigenpairs(cheap, tol=1e-3)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)), "bit for bit"
    assert found.converged.all() and found.exact_matvecs < found.matvecs == cheap.products + cheap.exact.products
    for value, v, r in zip(found.eigenvalues, found.eigenvectors, found.residuals, strict=True):
        assert float((H @ v - value * v).norm() / value.abs()) == pytest.approx(float(r), rel=0.05, abs=1e-6)
    assert found.eigenvalues.tolist() == pytest.approx(exact.eigenvalues.tolist(), rel=1e-5)


def test_a_cheap_search_that_is_far_off_says_so():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(700, 700, generator=generator, dtype=torch.float64)
    A = (A + A.T) / 2

    class Wrong(MatrixOperator):
        exact = MatrixOperator(torch.diag(torch.linspace(-1, 1, 700, dtype=torch.float64)))

    found = top_eigenpairs(Wrong(A), max_matvecs=60)
    assert not found.converged.all() and any("not converged" in w for w in found.warnings) and found.matvecs <= 60


def test_rounding_as_tf32_does_is_mended_by_few_exact_products():
    "Matrix products with 10 bits of mantissa, as a tensor core's inputs have."
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(2000, 2000, generator=generator))[0]
    values = torch.cat([torch.tensor([20.0, 12.0, 9.0]), torch.linspace(-1, 5, 1997)])
    A = (Q * values) @ Q.T
    A = (A + A.T) / 2

    class Rounded:
        n, device, exact = 2000, torch.device("cpu"), MatrixOperator(A)

        def __matmul__(self, v):
            low = lambda x: ((x.view(torch.int32) + 4096) & ~8191).view(torch.float32)
            return low(A.contiguous()) @ low(v.contiguous())

    found = top_eigenpairs(Rounded(), tol=1e-5)
    assert found.converged.all() and found.exact_matvecs <= 8, found
    assert found.eigenvalues.tolist() == pytest.approx([20.0, 12.0], rel=1e-5)


def test_precisions_are_checked(model):
    with pytest.raises(ValueError, match="precision 'fp8': there are"):
        LossHessian(model, texts(), precision="fp8")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="tf32 is a mode of NVIDIA GPUs"):
            LossHessian(model, texts(), precision="tf32")
    with pytest.raises(ValueError, match="is noise"):
        LossHessian(model, texts(), method="difference", precision="bfloat16")
    with pytest.raises(ValueError, match="there are exact, difference"):
        LossHessian(model, texts(), method="jvp")


def test_precision_switches_come_back(model):
    torch.set_float32_matmul_precision("high")
    try:
        LossHessian(model, texts()) @ torch.ones(sum(p.numel() for p in model.parameters()))
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


# ------------------------------------------------------------------------- faults


class Narrow:
    "A device with room for `tokens` tokens at once."

    def __init__(self, model, tokens):
        self.model, self.plain, self.tokens = model, model.forward, tokens

    def __enter__(self):
        def forward(input_ids=None, logits_to_keep=0, **kwargs):
            if input_ids.numel() > self.tokens:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            return self.plain(input_ids=input_ids, logits_to_keep=logits_to_keep, **kwargs)

        self.model.forward = forward

    def __exit__(self, *_):
        del self.model.forward


def test_out_of_memory_halves_the_budget_goes_on_and_says_so(model):
    H = LossHessian(model, texts(), token_budget=1000)
    v, expected = vector(H.n), LossHessian(model, texts()) @ vector(H.n)
    with Narrow(model, 9), pytest.warns(UserWarning, match="out of memory: token budget halved to"):
        assert close(H @ v, expected, 1e-6)
    assert H.notes and len(H.batches) > 1


def test_out_of_memory_at_one_example_says_what_to_do(model):
    H = LossHessian(model, texts())
    with Narrow(model, 5), warnings.catch_warnings(), pytest.raises(MemoryError, match="one example of 8 tokens"):
        warnings.simplefilter("ignore")
        H @ vector(H.n)


def test_other_errors_are_not_taken_for_a_lack_of_memory(model):
    H = LossHessian(model, texts())
    model.forward = lambda **_: (_ for _ in ()).throw(RuntimeError("shape mismatch"))
    try:
        with pytest.raises(RuntimeError, match="shape mismatch"):
            H @ vector(H.n)
    finally:
        del model.forward


def test_sharded_parameters_are_refused(model, monkeypatch):
    monkeypatch.setattr(torch.nn.Parameter, "placements", (), raising=False)
    with pytest.raises(ValueError, match="is sharded"):
        LossHessian(model, texts())


def test_fused_kernels_are_bypassed_and_put_back():
    import transformers.models.qwen3_5.modeling_qwen3_5 as code

    torch.manual_seed(1)
    model = qwen(True)
    H, names = LossHessian(model, texts()), ("torch_chunk_gated_delta_rule", "causal_conv1d_fn")
    expected, before = H @ vector(H.n), {name: getattr(code, name) for name in names}
    found = {name for _, name, _ in loss_module.replaced_functions(model)}
    assert set(names) <= found

    def install(name):
        "As transformers does it: the plain function wrapped by one that calls a kernel."
        wrapper = copy.copy(before[name])
        fast = type(wrapper)(compile("def fast(*a, **k): raise RuntimeError('no second derivative')", before[name].__code__.co_filename, "exec").co_consts[0], {})
        fast.__wrapped__ = before[name].__wrapped__
        return fast

    try:
        for name in names:
            setattr(code, name, install(name))
        H.release()
        assert close(H @ vector(H.n), expected, 1e-6)
        with pytest.raises(RuntimeError, match="no second derivative"):
            model(input_ids=torch.tensor([[1, 2, 3]]))
    finally:
        for name, function in before.items():
            setattr(code, name, function)


def test_a_model_in_training_mode_is_measured_without_dropout_and_stays_in_it():
    torch.manual_seed(1)
    model = llama(True).train()  # attention_dropout=0.1
    H = LossHessian(model, texts())
    v = vector(H.n)
    assert (H @ v).equal(H @ v) and model.training and model.model.layers[0].training
    assert close(H @ v, LossHessian(copy.deepcopy(model).eval(), texts()) @ v, 1e-6)


def test_frozen_parameters_are_no_directions(model):
    model.model.embed_tokens.weight.requires_grad_(False)
    H = LossHessian(model, texts())
    assert not any("embed" in name for name in H.named)
    full = llama(True)
    full.load_state_dict(model.state_dict())
    same = LossHessian(full, texts(), parameters=["*", "!*embed*"])
    assert close(H @ vector(H.n), same @ vector(H.n), 1e-6)


def test_nothing_is_left_displaced_by_an_interrupt(model):
    H, before = LossHessian(model, texts(), method="difference"), [p.clone() for p in model.parameters()]
    calls = iter(range(10))

    def interrupted():
        if next(calls) == 1:
            raise KeyboardInterrupt
        return torch.zeros(H.n)

    H.gradient = interrupted
    with pytest.raises(KeyboardInterrupt):
        H @ vector(H.n)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


# ------------------------------------------------------------------------- several processes

TWO = """
import sys, torch, torch.distributed as dist
sys.path[:0] = [{tests!r}, {root!r}]
from test_curvature import llama, qwen, texts, vector
from valuecot.curvature import GaussNewton, LossHessian, eigenplane, top_eigenpairs
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://{meet}", rank=int(sys.argv[1]), world_size=2)
found = dict()
for family in (llama, qwen):
    torch.manual_seed(1)
    model = family(True)
    H = LossHessian(model, texts(), distributed=True)
    s = top_eigenpairs(H)
    land = eigenplane(H, s.eigenvectors, [-0.1, 0.0, 0.1], [0.0])
    found[family.__name__] = dict(product=H @ vector(H.n), gn=GaussNewton(model, texts(), distributed=True) @ vector(H.n), gradient=H.gradient(), loss=H.loss, values=s.eigenvalues, matvecs=s.matvecs, land=land.loss, rows=H.rows)
torch.save(found, "{meet}." + sys.argv[1])
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    "What each of two processes found, for both families."
    here, meet = Path(__file__).parent, tmp_path_factory.mktemp("gloo") / "meet"
    code = TWO.format(tests=str(here), root=str(here.parent), meet=str(meet))
    running = [subprocess.Popen([sys.executable, "-c", code, str(rank)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    for process in running:
        assert process.wait(timeout=300) == 0, process.stderr.read()[-3000:]
    return [torch.load(f"{meet}.{rank}", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("family", [llama, qwen])
def test_two_processes_give_what_one_gives(processes, family):
    first, second = (found[family.__name__] for found in processes)
    assert sorted(first["rows"] + second["rows"]) == [0, 1, 2, 3] and first["product"].equal(second["product"])
    torch.manual_seed(1)
    model = family(True)
    H = LossHessian(model, texts())
    s = top_eigenpairs(H)
    assert close(first["product"], H @ vector(H.n), 1e-6) and close(first["gradient"], H.gradient(), 1e-6)
    assert close(first["gn"], GaussNewton(model, texts()) @ vector(H.n), 1e-6)
    assert first["loss"] == pytest.approx(H.loss, rel=1e-7) and first["matvecs"] == s.matvecs
    assert first["values"].tolist() == pytest.approx(s.eigenvalues.tolist(), rel=1e-5)
    assert first["land"].flatten().tolist() == pytest.approx(eigenplane(H, s.eigenvectors, [-0.1, 0.0, 0.1], [0.0]).loss.flatten().tolist(), rel=1e-5)


def test_distributed_without_processes_says_how_to_start_them(model):
    with pytest.raises(RuntimeError, match="torchrun"):
        LossHessian(model, texts(), distributed=True)


# ------------------------------------------------------------------------- beyond lambda


def test_attribution_is_exact_on_the_oracle(oracle):
    model, H, _, _ = oracle
    v = vector(len(H), 5).double()
    with Float64():
        for reduction in ("token", "example"):
            operator = LossHessian(model, texts(), reduction=reduction)
            found = attribute(operator, v, ["a", "b", "a", "b"], token_budget=12)
            assert found.value == pytest.approx(float(v @ (operator @ v)), rel=1e-9)
            assert sum(found.groups.values()) == pytest.approx(found.value, rel=1e-12)
        alone = LossHessian(model, texts()[2:3])
        tokens = token_curvature(LossHessian(model, texts()), v)[2]
        assert float(tokens.mean()) == pytest.approx(float(v @ (alone @ v)), rel=1e-9), "an example's mean is its own curvature"
    assert found.counts == {"a": 3 + 3, "b": 4 + 5}


def test_bad_attribution(model):
    H = LossHessian(model, texts())
    with pytest.raises(ValueError, match="unit norm"):
        attribute(H, torch.ones(H.n))
    with pytest.raises(ValueError, match="2 group labels for 4 examples"):
        attribute(H, vector(H.n), ["a", "b"])


def test_block_sharpness_is_bounded_by_the_whole(model):
    whole = top_eigenpairs(LossHessian(model, texts()), 1).lambda_max
    parts = block_sharpness(model, texts(), "kind", tol=1e-3)
    assert set(parts) == {"embedding", "attention", "mlp", "norm"} and all(s.lambda_max <= whole * 1.001 for s in parts.values())


@pytest.mark.parametrize("units", ["weights", "filters"])
def test_adaptive_sharpness_survives_a_rescaling_that_lambda_does_not(model, units):
    "SwiGLU is linear in up_proj: eight times it and an eighth of down_proj are the same function elsewhere."

    def both() -> tuple[float, float]:
        H = LossHessian(model, texts())
        return top_eigenpairs(H, 1, 1e-4).lambda_max, adaptive_sharpness(H, 1e-4, units=units).lambda_max

    plain, own = both()
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.up_proj.weight *= 8
        mlp.down_proj.weight /= 8
    moved, same = both()
    assert same == pytest.approx(own, rel=1e-3) and abs(moved / plain - 1) > 0.05


@pytest.mark.parametrize("slope, told", [(0.0, False), (0.1, False), (2.0, True)])
def test_a_gradient_that_is_not_small_is_told(slope, told):
    "Newton's step along v1 would gain slope^2 / (2 lambda), against a tenth of the loss."
    bowl = MatrixOperator(torch.diag(torch.tensor([4.0, 1.0, 0.5])), gradient=torch.tensor([slope, 0.0, 0.0]), loss=1.0)
    assert any("gradient is not small" in note for note in top_eigenpairs(bowl).warnings) == told


def test_overlaps():
    a = torch.linalg.qr(torch.randn(50, 2, generator=torch.Generator().manual_seed(0)))[0].T
    turned = torch.tensor([[0.6, 0.8], [-0.8, 0.6]]) @ a
    assert overlaps(a, turned).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    assert overlaps(a, torch.eye(50)[:1]).shape == (1,)


# ------------------------------------------------------------------------- landscapes


def test_slope_and_curvature_separate_exactly():
    bowl = MatrixOperator(torch.diag(torch.tensor([4.0, 1.0])), gradient=torch.tensor([3.0, 0.0]), loss=2.0)
    axis = torch.linspace(-1, 1, 5, dtype=torch.float64)
    slope, bend = slope_and_curvature(eigenplane(bowl, torch.eye(2), axis, axis))
    assert torch.allclose(slope, 3 * axis[:, None].expand(5, 5), atol=1e-6)
    assert torch.allclose(bend, 2 * axis[:, None] ** 2 + axis[None] ** 2 / 2, atol=1e-6)
    with pytest.raises(ValueError, match="not symmetric"):
        slope_and_curvature(eigenplane(bowl, torch.eye(2), [0.0, 1.0], [0.0]))


def test_a_preview_is_exact_for_polynomials_and_labelled():
    bowl = MatrixOperator(torch.diag(torch.tensor([4.0, 1.0])), gradient=torch.tensor([3.0, 0.0]), loss=2.0)
    axis = torch.linspace(-2, 2, 7)
    preview, full = plane_preview(bowl, torch.eye(2), axis, axis, points=4), eigenplane(bowl, torch.eye(2), axis, axis)
    assert torch.allclose(preview.loss, full.loss, atol=1e-5) and "preview" in preview.note and full.note == ""


def test_random_planes_have_the_weights_own_row_norms(model):
    H = LossHessian(model, texts())
    plane = filter_normalized(H, seed=3)
    for piece, p in zip(views(plane[0], H.parameters), H.parameters, strict=True):
        if p.ndim > 1:
            assert torch.allclose(piece.flatten(1).norm(dim=1), p.detach().flatten(1).norm(dim=1), rtol=1e-5)
        else:
            assert not piece.any()
    assert plane.equal(filter_normalized(H, seed=3)) and not plane.equal(filter_normalized(H, seed=4))
    land = loss_plane(H, plane, [0.0, 0.1], [0.0])
    assert float(land.loss[0, 0]) == land.center


def test_adding_and_taking_back_would_drift_and_the_master_copy_does_not(model):
    H = LossHessian(model, texts())
    before = [p.clone() for p in model.parameters()]
    v = torch.stack([vector(H.n), vector(H.n, 1)])
    with movable(H, v) as move:
        for step in torch.linspace(-1, 1, 200).tolist():
            move(step, -step)
        move(0.0, 0.0)
        assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


# ------------------------------------------------------------------------- memory


def peak_of_product(vocabulary: int, chunk: int, parameters: list[str] | None) -> tuple[int, int]:  # bytes, n
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **shape, tie_word_embeddings=True))
    examples = [{"input_ids": (ids := torch.randint(1000, (64,))), "labels": ids.clone()} for _ in range(8)]
    H = LossHessian(model, examples, parameters=parameters, chunk=chunk, keep=0)
    v = torch.ones(H.n)
    with Live() as live:
        H @ v
    return live.peak, H.n


def test_memory_of_a_product_is_flat_in_the_vocabulary():
    "From 1k to 64k, beside the vectors themselves, which grow with the embedding."
    body = [peak_of_product(v, 1 << 16, ["*layers*"])[0] for v in (1024, 8192, 65536)]
    assert max(body) < 1.15 * min(body), body
    (small, n), (large, m) = (peak_of_product(v, 1 << 16, None) for v in (1024, 65536))
    assert large - small < 6 * 4 * (m - n), "the sum, two gradients and their parts, all of the size of the weights"
    naive = 7 * 4 * 512 * 65536
    assert large < naive / 10


def test_the_planner_foretells_the_peak():
    shape = {"vocab_size": 700, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 4}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "head_dim": 16}
    for kind, config in ((LlamaForCausalLM, LlamaConfig(**shape)), (Qwen3_5ForCausalLM, Qwen3_5TextConfig(**shape, **linear))):
        with torch.device("meta"):
            ghost = kind(config)
        lengths = [96, 64, 33, 80] * 5
        cost = predict(ghost, lengths, [20] * 20, token_budget=512)
        model = kind(config)
        examples = [{"input_ids": torch.randint(700, (n,)), "labels": torch.cat([torch.full((n - 20,), -100), torch.randint(700, (20,))])} for n in lengths]
        H, v = LossHessian(model, examples, token_budget=512, keep=0), torch.ones(cost.parameters)
        with Live() as live:
            H @ v
        assert cost.parameters == H.n and cost.batches == len(H.batches) and cost.product_flops > 6 * cost.forward_flops
        assert cost.product_bytes - v.nbytes == pytest.approx(live.peak, rel=0.15), kind.__name__
        K = LossHessian(model, examples, token_budget=512)
        K @ v
        assert cost.kept_bytes == pytest.approx(K.graphs.held, rel=0.3), kind.__name__


RESIDENT = """
import re, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from valuecot.curvature import LossHessian
from valuecot.curvature.planner import predict
torch.set_num_threads(1)

def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024

config = LlamaConfig(vocab_size=8000, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
with torch.device("meta"):
    ghost = LlamaForCausalLM(config)
cost, model = predict(ghost, [129] * 16), LlamaForCausalLM(config)
rows = [{"input_ids": (ids := torch.randint(8000, (129,))), "labels": ids.clone()} for _ in range(16)]
H, v = LossHessian(model, rows, keep=0), torch.ones(cost.parameters)
LossHessian(model, rows[:1], keep=0) @ v  # libraries take their own memory
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = status("VmRSS")
H @ v
print((cost.product_bytes - v.nbytes) / (status("VmHWM") - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_planner_foretells_resident_memory():
    "Where the allocator gives freed blocks back at once; glibc's default adds up to as much again."
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", RESIDENT], env=env, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) == pytest.approx(1, rel=0.15)


def test_vectors_in_the_machines_memory_change_nothing(model):
    H = LossHessian(model, texts())
    here, there = both_ends(H, tol=1e-3), both_ends(Hosted(H), tol=1e-3)
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.eigenvalues, b.eigenvalues) and torch.equal(a.eigenvectors, b.eigenvectors) and torch.equal(a.residuals, b.residuals)
        assert (a.loss, a.gradient_norm, a.examples, a.reduction, a.matvecs) == (b.loss, b.gradient_norm, b.examples, b.reduction, b.matvecs)
    assert Hosted(H).exact.H is H and Hosted(LossHessian(model, texts(), method="difference")).exact.H.method == "exact"
    with pytest.raises(AttributeError):
        Hosted(H).no_such_thing  # noqa: B018


def test_the_planner_finds_the_largest_batch():
    "Which need not be the one with the longest text."
    shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    with torch.device("meta"):
        ghost = LlamaForCausalLM(LlamaConfig(**shape))
    lengths = [131, *[125] * 6]
    cost, model = predict(ghost, lengths, token_budget=256), LlamaForCausalLM(LlamaConfig(**shape))
    rows = [{"input_ids": torch.randint(300, (n,)), "labels": torch.randint(300, (n,))} for n in lengths]
    H, v = LossHessian(model, rows, token_budget=256, keep=0), torch.ones(cost.parameters)
    with Live() as live:
        H @ v
    assert cost.product_bytes - v.nbytes == pytest.approx(live.peak, rel=0.15)


def test_the_planner_wants_shapes_only(model):
    with pytest.raises(ValueError, match="torch.device"):
        predict(model, [8])


# ------------------------------------------------------------------------- peers (benchmarks/peers.txt)


def summed(logits, labels):
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum")


def test_curvlinops_sees_the_same_hessian(monkeypatch):
    "Its products go forwards over backwards; SiLU's backward has no such rule in torch, so SiLU is written out for it."
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(1)
    model = llama(False).eval()
    model.set_attn_implementation("eager")
    H, v = LossHessian(model, texts()), vector(1000)
    v = v[: H.n] / v[: H.n].norm()
    expected = H @ v

    class Silu(torch.nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(x)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, X):
            return self.model(input_ids=X["input_ids"], attention_mask=X["attention_mask"], use_cache=False).logits

    class Loss(torch.nn.Module):
        reduction = "sum"

        def forward(self, logits, labels):
            return summed(logits, labels) / H.total

    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = Silu()
    wrapped = Logits()
    data = [({"input_ids": x[:, 0], "attention_mask": x[:, 1]}, y) for x, y in loader(texts(), 2)]
    operator = curvlinops.HessianLinearOperator(wrapped, Loss(), list(wrapped.parameters()), data, batch_size_fn=lambda X: len(X["input_ids"]), check_deterministic=False)
    theirs = operator @ v
    assert close(torch.as_tensor(theirs).flatten(), expected, 1e-5)


def test_hessian_eigenthings_sees_the_same_hessian():
    peer = pytest.importorskip("hessian_eigenthings")
    for family in (llama, qwen):
        torch.manual_seed(1)
        model = family(True).eval()
        model.set_attn_implementation("eager")
        H = LossHessian(model, texts())
        rows = [{"input_ids": x[:, 0], "attention_mask": x[:, 1], "labels": y} for x, y in loader(texts(), 2)]
        weighted = lambda m, b: summed(m(input_ids=b["input_ids"], attention_mask=b["attention_mask"], use_cache=False).logits, b["labels"]) * (len(rows) / H.total)  # noqa: B023
        found = peer.lanczos(peer.HessianOperator(model, rows, weighted), k=2, max_iter=40, tol=1e-6, seed=0)
        ours = top_eigenpairs(H, tol=1e-4, which="magnitude")
        assert sorted(found.eigenvalues.tolist()) == pytest.approx(sorted(ours.eigenvalues.tolist()), rel=1e-3)


@pytest.mark.parametrize("options, said", [
    ({"chunk": 0}, "chunk must be positive"), ({"keep": -1}, "keep=-1"), ({"method": "difference", "step": float("inf")}, "step must be positive"), ({"token_budget": 0}, "token_budget"),
])  # fmt: skip
def test_numbers_that_make_no_operator(options, said):
    with pytest.raises(ValueError, match=said):
        LossHessian(llama(True), texts(), **options)


def test_vectors_of_another_length_are_named():
    H = LossHessian(llama(True), texts())
    with pytest.raises(ValueError, match="shape"):
        H @ torch.ones(H.n + 1)
    with pytest.raises(ValueError, match="the parameters need"):
        eigenplane(H, torch.eye(2, H.n - 1), [0.0], [0.0])


def test_every_result_says_which_texts_it_is_of():
    H = LossHessian(llama(True), texts())
    s = top_eigenpairs(H)
    found = [s, hutchinson_trace(H, 2), spectral_density(H, 1, 3), attribute(H, s.eigenvectors[0]), adaptive_sharpness(H)]
    assert {(f.reduction, f.examples) for f in found} == {("token", H.fingerprint)}


@pytest.mark.parametrize("changed, said", [
    (lambda e: {**e, "attention_mask": torch.cat([torch.zeros(1), torch.ones(len(e["labels"]) - 1)])}, "is padded"), (lambda e: {**e, "input_ids": e["input_ids"] + 0.7}, "whole numbers"),
    (lambda e: {k: v[None] for k, v in e.items()}, "drop the batch dimension"), (lambda e: "a text", "is a str"),
])  # fmt: skip
def test_examples_that_would_be_read_wrongly(changed, said):
    rows = texts()
    with pytest.raises(ValueError, match=f"example 1.*{said}"):
        LossHessian(llama(True), [rows[0], changed(rows[1])])


def test_a_generator_and_a_full_mask_are_taken():
    model, rows = llama(True), texts()
    masked = ({**e, "attention_mask": torch.ones_like(e["labels"])} for e in rows)
    assert LossHessian(model, masked).fingerprint == LossHessian(model, rows).fingerprint


def test_a_vector_that_is_no_number_is_blamed_and_not_the_model():
    H = LossHessian(llama(True), texts())
    with pytest.raises(ValueError, match="v holds inf or nan"):
        H @ torch.full((H.n,), float("nan"))


@pytest.mark.parametrize("groups, said", [([["a"] * 2] * 4, "2 token labels"), ([0, 1, 0, 1], "is no label"), (["a"], "one each")])
def test_groups_are_looked_at_before_the_work(monkeypatch, groups, said):
    monkeypatch.setattr("valuecot.curvature.report.both_ends", lambda *a: pytest.fail("work was done first"))
    with pytest.raises(ValueError, match=said):
        measure(llama(True), texts(), groups=groups)
