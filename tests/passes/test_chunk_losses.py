"""The chunked-loss pass: every spelling, with eager's loss and gradients, and no logits whole."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import memopt
from memopt.backend import compile_graph, read_options
from memopt.lazy_logits import LazyLogits
from memopt.passes import PRE_GRAD
from memopt.pipeline import PassContext, Pipeline
from memopt.record import GraphRecord
from tests import references

TOKENS, HIDDEN, CLASSES = 24, 16, 307
BATCH = (4, 6)


class Inputs:
    """Hidden states, a head and targets, in double precision."""

    def __init__(self, *, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.x = torch.randn(*BATCH, HIDDEN, dtype=torch.float64, requires_grad=True)
        self.w = torch.randn(CLASSES, HIDDEN, dtype=torch.float64, requires_grad=True)
        self.b = torch.randn(CLASSES, dtype=torch.float64, requires_grad=True)
        self.y = torch.randint(0, CLASSES, BATCH)
        self.y[0, :3] = -100
        self.known = self.y.clamp(min=0)
        self.soft = torch.randn(*BATCH, CLASSES, dtype=torch.float64).softmax(-1)
        self.weight = torch.rand(CLASSES, dtype=torch.float64)
        self.buffer = torch.randn(1, CLASSES, dtype=torch.float64)
        self.count = torch.tensor(17.0, dtype=torch.float64)
        self.mask = torch.rand(BATCH, dtype=torch.float64)
        self.temperature = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)

    @property
    def trained(self) -> list[Tensor]:
        return [self.x, self.w, self.b, self.temperature]


Function = Callable[[Inputs], Any]


def flat(z: Tensor) -> Tensor:
    return z.reshape(-1, CLASSES)


def shifted(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(flat(z[..., :-1, :].contiguous()), y[..., 1:].reshape(-1))


def padded(i: Inputs, z: Tensor) -> Tensor:
    labels = F.pad(i.y, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
    return (
        F.cross_entropy(z.view(-1, CLASSES), labels, ignore_index=-100, reduction="sum") / i.count
    )


def capped(z: Tensor, cap: float) -> Tensor:
    return torch.tanh(z / cap) * cap


def z_loss(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(flat(z), y.flatten()) + 1e-2 * (torch.logsumexp(z, -1) ** 2).mean()


def log_probs(z: Tensor, y: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)


def selected(z: Tensor, y: Tensor) -> Tensor:
    return torch.gather(z, -1, y.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(z, -1)


def ratio(i: Inputs) -> Tensor:
    """The old policy without gradients, the new one with: the same expression twice."""
    logits = F.linear(i.x, i.w)
    with torch.no_grad():
        old = log_probs(logits, i.known)
    return ((log_probs(logits, i.known) - old).exp() * i.mask).sum()


def stacked(z: Tensor, y: Tensor) -> Tensor:
    """A log-sum-exp for each sequence by itself, as trainers write it to save memory."""
    values = torch.gather(z, dim=-1, index=y.unsqueeze(-1)).squeeze(-1)
    return values - torch.stack([torch.logsumexp(rows, dim=-1) for rows in z])


def stacked_log_probs(z: Tensor, y: Tensor) -> Tensor:
    rows = [
        F.log_softmax(own, dim=-1).gather(dim=-1, index=labels.unsqueeze(-1)).squeeze(-1)
        for own, labels in zip(z, y, strict=True)
    ]
    return torch.stack(rows)


def relu_in_place(i: Inputs) -> Tensor:
    """Writes that nothing reads by name must survive the rewrite."""
    hidden = i.x.detach() * 1
    F.relu(hidden, inplace=True)
    alias = hidden
    alias += 1
    return F.cross_entropy(flat(F.linear(i.x, i.w)), i.y.view(-1)) + hidden.sum()


FORMS: dict[str, Function] = {
    "old and new policy": ratio,
    "beside writes in place": relu_in_place,
    "weight stored the other way round": lambda i: F.cross_entropy(
        flat(i.x @ i.w.t().contiguous()), i.y.view(-1)
    ),
    "two readers, one detached": lambda i: (
        F.cross_entropy(flat(z := F.linear(i.x, i.w)), i.y.view(-1))
        * F.cross_entropy(flat(z.detach()), i.y.view(-1), reduction="sum").sqrt()
    ),
    "three dimensions": lambda i: F.cross_entropy(F.linear(i.x, i.w).transpose(1, 2), i.y),
    "permuted": lambda i: F.cross_entropy(F.linear(i.x, i.w).permute(0, 2, 1), i.y),
    "flattened": lambda i: F.cross_entropy(F.linear(i.x, i.w).flatten(0, 1), i.y.flatten()),
    "matmul": lambda i: F.cross_entropy(flat(i.x @ i.w.t()), i.y.view(-1)),
    "matmul, T": lambda i: F.cross_entropy(flat(torch.matmul(i.x, i.w.T)), i.y.view(-1)),
    "bias": lambda i: F.cross_entropy(flat(F.linear(i.x, i.w, i.b)), i.y.view(-1)),
    "buffer bias": lambda i: F.cross_entropy(flat(F.linear(i.x, i.w) + i.buffer), i.y.view(-1)),
    "shifted": lambda i: shifted(F.linear(i.x, i.w), i.y),
    "padded, by count": lambda i: padded(i, F.linear(i.x, i.w)),
    "sum": lambda i: F.cross_entropy(flat(F.linear(i.x, i.w)), i.y.view(-1), reduction="sum"),
    "none, masked": lambda i: (
        F.cross_entropy(F.linear(i.x, i.w).transpose(1, 2), i.y, reduction="none") * i.mask
    ).sum(),
    "none, flat": lambda i: (
        F.cross_entropy(flat(F.linear(i.x, i.w)), i.y.view(-1), reduction="none")
        * i.mask.flatten()
    ).sum(),
    "smoothed": lambda i: F.cross_entropy(
        flat(F.linear(i.x, i.w)), i.y.view(-1), label_smoothing=0.1
    ),
    "class weights": lambda i: F.cross_entropy(
        flat(F.linear(i.x, i.w)), i.y.view(-1), weight=i.weight, label_smoothing=0.2
    ),
    "soft targets": lambda i: F.cross_entropy(flat(F.linear(i.x, i.w)), flat(i.soft)),
    "soft targets, three dimensions": lambda i: F.cross_entropy(
        F.linear(i.x, i.w).transpose(1, 2), i.soft.transpose(1, 2)
    ),
    "softcap": lambda i: F.cross_entropy(flat(capped(F.linear(i.x, i.w), 5.0)), i.y.view(-1)),
    "scale": lambda i: F.cross_entropy(flat(F.linear(i.x, i.w) * 0.25), i.y.view(-1)),
    "divided, in place": lambda i: F.cross_entropy(
        flat(F.linear(i.x, i.w).div_(4.0)), i.y.view(-1)
    ),
    "scale and softcap": lambda i: F.cross_entropy(
        flat(capped(F.linear(i.x, i.w) / 3.0, 2.0)), i.y.view(-1)
    ),
    "temperature that is trained": lambda i: F.cross_entropy(
        flat(F.linear(i.x, i.w) * i.temperature), i.y.view(-1)
    ),
    "log-softmax and nll": lambda i: F.nll_loss(
        F.log_softmax(flat(F.linear(i.x, i.w)), dim=-1), i.y.view(-1)
    ),
    "z-loss": lambda i: z_loss(F.linear(i.x, i.w), i.y),
    "two temperatures": lambda i: (
        F.cross_entropy(flat(z := F.linear(i.x, i.w)), i.y.view(-1))
        + F.cross_entropy(flat(z * 0.5), i.y.view(-1))
        + torch.logsumexp(z * 0.25, -1).mean()
    ),
    "z-loss, weighted": lambda i: (
        F.cross_entropy(flat(z := F.linear(i.x, i.w)), i.y.view(-1), weight=i.weight)
        + torch.logsumexp(flat(z), 1).square().mean()
    ),
    "log-probabilities": lambda i: (log_probs(F.linear(i.x, i.w), i.known) * i.mask).sum(),
    "selected log-probabilities": lambda i: (selected(F.linear(i.x, i.w), i.known) * i.mask).sum(),
    "stacked log-sum-exps": lambda i: (stacked(F.linear(i.x, i.w), i.known) * i.mask).sum(),
    "stacked log-probabilities": lambda i: (
        stacked_log_probs(F.linear(i.x, i.w), i.known) * i.mask
    ).sum(),
    "stacked out of order": lambda i: (
        torch.stack([torch.logsumexp(rows, -1) for rows in reversed(list(F.linear(i.x, i.w)))])
        * i.mask
    ).sum(),
    "part of a larger loss": lambda i: 3 * shifted(F.linear(i.x, i.w), i.y) ** 2 + i.x.mean(),
    "one token per sequence": lambda i: F.cross_entropy(F.linear(i.x[:, -1], i.w), i.known[:, 0]),
    "tied to an embedding": lambda i: shifted(F.linear(i.x + F.embedding(i.known, i.w), i.w), i.y),
}


def options(**chunk: Any) -> dict[str, Any]:
    return {"lowering": "eager", "strict": True, "passes": {"chunk_losses": chunk or True}}


def gradients(value: Tensor, inputs: Inputs) -> list[Tensor | None]:
    for tensor in inputs.trained:
        tensor.grad = None
    value.backward()  # type: ignore[no-untyped-call]
    return [None if t.grad is None else t.grad.clone() for t in inputs.trained]


def run_compiled(
    function: Callable[..., Any], *args: Any, **chunk: Any
) -> tuple[Any, list[GraphRecord]]:
    """The result of one call, and what was said of each graph."""
    config, records = read_options(options(**chunk)), list[GraphRecord]()

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return compile_graph(gm, inputs, config, records.append)

    return torch.compile(function, backend=backend)(*args), records


def assert_close(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None and e is not None:
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk_rows", [0, 5])
def test_every_spelling_is_found_and_gives_eagers_loss_and_gradients(
    form: str, chunk_rows: int
) -> None:
    function, inputs = FORMS[form], Inputs()
    expected = function(inputs)
    wanted = gradients(expected, inputs)
    actual, (record,) = run_compiled(function, inputs, chunk_rows=chunk_rows)
    assert record.rewrites["chunk_losses"] == 1, record.remarks
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert_close(gradients(actual, inputs), wanted)


@pytest.mark.parametrize("form", [f for f in FORMS if not f.startswith("soft")])
def test_no_node_of_the_rewritten_graph_holds_logits(form: str) -> None:
    sizes: list[int] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        Pipeline("pre_grad", PRE_GRAD).run(gm, PassContext(read_options(options())))
        for node in gm.graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, Tensor) and node.op != "placeholder":
                sizes.append(value.numel())
        return gm.forward

    torch.compile(FORMS[form], backend=backend)(Inputs())
    assert max(sizes) < TOKENS * CLASSES


def overwritten(i: Inputs) -> Tensor:
    hidden = i.x * 1.0
    logits = F.linear(hidden, i.w.detach())
    hidden.add_(1.0)
    return F.cross_entropy(flat(logits), i.y.view(-1)) + hidden.sum()


def through_a_view(i: Inputs) -> Tensor:
    logits = F.linear(i.x, i.w)
    logits.view(-1, CLASSES).mul_(2.0)
    return F.cross_entropy(flat(logits), i.y.view(-1))


def per_sample(i: Inputs) -> Tensor:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, i.w), y)

    return torch.vmap(loss)(i.x, i.known).sum()


DECLINED: dict[str, tuple[Function, str]] = {
    "a temperature behind a detach": (
        lambda i: F.cross_entropy(flat(F.linear(i.x, i.w).detach() / i.temperature), i.y.view(-1)),
        "also read by cross_entropy",
    ),
    "a bias with a dimension more": (
        lambda i: F.cross_entropy(
            (flat(F.linear(i.x, i.w)) + i.buffer.view(1, 1, -1))[0], i.y.view(-1)
        ),
        "also read by",
    ),
    "accuracy in the graph": (
        lambda i: (
            F.cross_entropy(flat(z := F.linear(i.x, i.w)), i.y.view(-1))
            + (z.argmax(-1) == i.y).double().mean()
        ),
        "also read by argmax",
    ),
    "hidden state overwritten": (overwritten, "overwrites an input of the head"),
    "logits overwritten through a view": (through_a_view, "also read by"),
    "inside vmap": (per_sample, "inside a functorch transform"),
    "few classes": (
        lambda i: F.cross_entropy(flat_few(i), i.known.view(-1) % 9),
        "too few to pay",
    ),
    "trained targets": (
        lambda i: F.cross_entropy(flat(F.linear(i.x, i.w)), flat(i.x @ i.w.T).softmax(-1)),
        "also read by",
    ),
    "sum of two linear layers": (
        lambda i: F.cross_entropy(flat(F.linear(i.x, i.w) + F.linear(i.x, i.w)), i.y.view(-1)),
        "also read by",
    ),
    "negative factor": (
        lambda i: F.cross_entropy(flat(F.linear(i.x, i.w) * -1.0), i.y.view(-1)),
        "also read by",
    ),
    "the memory read as another dtype": (
        lambda i: (
            F.cross_entropy(
                flat(F.linear(i.x, i.w).detach().view(torch.int64).view(torch.float64)),
                i.y.view(-1),
            )
            + i.x.sum()
        ),
        "also read by view",
    ),
    "quantised to eight bits": (
        lambda i: F.cross_entropy(
            flat(F.linear(i.x, i.w).to(torch.float8_e4m3fn).to(torch.float64)), i.y.view(-1)
        ),
        "also read by",
    ),
    "one loss is the bias of another": (
        lambda i: F.cross_entropy(
            (z := F.linear(i.w, i.w)) + torch.logsumexp(z, -1), torch.arange(CLASSES) % 7
        ),
        "one loss on the logits is an input of another",
    ),
    "factor per class": (
        lambda i: F.cross_entropy(flat(F.linear(i.x, i.w) * i.weight), i.y.view(-1)),
        "also read by",
    ),
}


def flat_few(i: Inputs) -> Tensor:
    return F.linear(i.x, i.w[:9]).reshape(-1, 9)


@pytest.mark.parametrize("form", DECLINED)
def test_what_cannot_be_served_is_left_alone_with_the_reason(form: str) -> None:
    function, reason = DECLINED[form]
    inputs = Inputs()
    expected = function(inputs)
    wanted = gradients(expected, inputs)
    actual, (record,) = run_compiled(function, inputs)
    assert record.rewrites["chunk_losses"] == 0
    remarks = [r for r in record.remarks if r.pass_name == "chunk_losses"]
    assert any(reason in r.text for r in remarks), remarks
    assert all(r.source for r in remarks)
    torch.testing.assert_close(actual, expected)
    assert_close(gradients(actual, inputs), wanted)


@pytest.mark.parametrize(
    "form",
    [
        "z-loss",
        "z-loss, weighted",
        "selected log-probabilities",
        "stacked log-sum-exps",
        "stacked log-probabilities",
    ],
)
def test_readers_of_the_same_rows_share_one_operator(form: str) -> None:
    calls: list[str] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        Pipeline("pre_grad", PRE_GRAD).run(gm, PassContext(read_options(options())))
        calls.extend(n.name for n in gm.graph.nodes if "linear_cross_entropy" in str(n.target))
        return gm.forward

    torch.compile(FORMS[form], backend=backend)(Inputs())
    assert len(calls) == 1


@pytest.mark.parametrize("frozen", ["x", "w", "all but the bias"])
def test_a_frozen_part_gets_no_gradient_and_the_others_theirs(frozen: str) -> None:
    inputs = Inputs()
    for name in ("x", "w") if frozen.startswith("all") else (frozen,):
        getattr(inputs, name).requires_grad_(False)
    expected = gradients(FORMS["bias"](inputs), inputs)
    actual, (record,) = run_compiled(FORMS["bias"], inputs)
    assert record.rewrites["chunk_losses"] == 1
    assert_close(gradients(actual, inputs), expected)


def test_without_gradients_the_operator_is_asked_for_none() -> None:
    inputs, asked = Inputs(), []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        Pipeline("pre_grad", PRE_GRAD).run(gm, PassContext(read_options(options())))
        for node in gm.graph.nodes:
            if "linear_cross_entropy" in str(node.target):
                asked.append(list(node.args[10]))
        return gm.forward

    compiled = torch.compile(FORMS["flattened"], backend=backend)
    with torch.no_grad():
        assert torch.allclose(compiled(inputs), FORMS["flattened"](inputs))
    compiled(inputs)
    assert asked == [[False, False, False], [True, True, False]]


def test_all_labels_ignored_gives_eagers_nan_and_eagers_zero_gradients() -> None:
    inputs = Inputs()
    inputs.y.fill_(-100)
    expected = gradients(value := FORMS["flattened"](inputs), inputs)
    actual, _ = run_compiled(FORMS["flattened"], inputs)
    assert value.isnan()
    assert actual.isnan()
    assert_close(gradients(actual, inputs), expected)


def test_a_label_out_of_range_fails_as_eager_does() -> None:
    inputs = Inputs()
    inputs.y[1, 1] = CLASSES
    with pytest.raises(IndexError, match="out of bounds"):
        FORMS["flattened"](inputs)
    with pytest.raises(IndexError, match=f"Target {CLASSES} is out of bounds"):
        run_compiled(FORMS["flattened"], inputs)


def test_lengths_change_without_a_recompilation() -> None:
    frames: list[int] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        frames.append(len(inputs))
        return compile_graph(gm, inputs, read_options(options()))

    def function(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return z_loss(F.linear(x, w), y) + shifted(F.linear(x, w), y)

    compiled = torch.compile(function, backend=backend, dynamic=True)
    i = Inputs()
    for length in (5, 3, 4):
        x, y = i.x[:, :length].contiguous(), i.known[:, :length].contiguous()
        torch.testing.assert_close(compiled(x, i.w, y), function(x, i.w, y))
    assert len(frames) == 1


def test_autocast_computes_in_its_dtype() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 32, requires_grad=True)
    w = torch.randn(CLASSES, 32, requires_grad=True)
    y = torch.randint(0, CLASSES, (64,))

    def function(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(F.linear(x, w).float(), y)

    expected = torch.autograd.grad(function(x, w), (x, w))
    actual, (record,) = run_compiled(function, x, w)
    assert record.rewrites["chunk_losses"] == 1
    exact = torch.autograd.grad(F.cross_entropy(x.double() @ w.double().T, y), (x, w))
    for a, e, truth in zip(torch.autograd.grad(actual, (x, w)), expected, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - truth).abs().max() <= 1.5 * (e - truth).abs().max()


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("back", [False, True])
def test_logits_rounded_before_the_loss_are_as_near_to_float64_as_eagers(
    narrow: torch.dtype, back: bool
) -> None:
    y = torch.randint(0, CLASSES, (TOKENS,))

    def rounded(x: Tensor, w: Tensor) -> Tensor:
        z = F.linear(x, w).to(narrow)
        return F.cross_entropy(z.float() if back else z, y)

    def exact(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w), y)

    def compiled(x: Tensor, w: Tensor) -> Tensor:
        torch._dynamo.reset()
        value, (record,) = run_compiled(rounded, x, w)
        assert record.rewrites["chunk_losses"] == 1
        assert isinstance(value, Tensor)
        return value

    def draw() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        inputs = [torch.randn(TOKENS, HIDDEN), torch.randn(CLASSES, HIDDEN)]
        truth = references.run(exact, references.doubles(inputs))
        return references.run(compiled, inputs), truth, references.run(rounded, inputs)

    references.assert_draws_within_reference_error(draw)


def test_a_head_may_read_what_takes_the_place_of_another_ones_loss() -> None:
    def function(i: Inputs) -> Tensor:
        normaliser = torch.logsumexp(F.linear(i.x, i.w), -1)
        return F.cross_entropy(F.linear(normaliser, i.w[:, : BATCH[1]]), i.known[:, 0])

    inputs = Inputs()
    expected = function(inputs)
    wanted = gradients(expected, inputs)
    actual, (record,) = run_compiled(function, inputs)
    assert record.rewrites["chunk_losses"] == 2
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert_close(gradients(actual, inputs), wanted)


class Model(nn.Module):
    """A head whose logits are returned, as language models do."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.body = nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64)
        self.head = nn.Linear(HIDDEN, CLASSES, bias=bias, dtype=torch.float64)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.body(x)) * 0.5
        return shifted(logits, y), logits


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model(bias=True)


def parameter_gradients(model: Model, loss: Tensor) -> list[Tensor | None]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def test_returned_logits_are_lazy_and_have_eagers_values_and_gradients(model: Model) -> None:
    i = Inputs()
    loss, logits = model(i.x, i.y)
    expected = parameter_gradients(model, loss + logits.square().mean())
    compiled = torch.compile(model, backend="memopt", options=options())
    loss, lazy = compiled(i.x, i.y)
    assert isinstance(lazy, LazyLogits)
    assert lazy.shape == logits.shape
    assert torch.equal(lazy.detach(), logits)
    assert_close(parameter_gradients(model, loss + lazy.square().mean()), expected)


def test_returned_logits_can_be_dropped_kept_or_left_whole(model: Model) -> None:
    i = Inputs()
    loss, logits = model(i.x, i.y)
    expected = parameter_gradients(model, loss)
    for mode in ("none", "keep", "full"):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="memopt", options=options(logits=mode))
        loss, returned = compiled(i.x, i.y)
        assert_close(parameter_gradients(model, loss), expected)
        assert type(returned) is (type(None) if mode == "none" else Tensor)
        if returned is not None:
            torch.testing.assert_close(returned, logits)
            assert returned.requires_grad == (mode == "full")


def test_logits_that_are_read_behind_a_graph_break_are_lazy_and_not_none() -> None:
    def function(i: Inputs) -> tuple[Tensor, Tensor]:
        logits = F.linear(i.x, i.w)
        loss = F.cross_entropy(flat(logits), i.y.view(-1))
        torch._dynamo.graph_break()
        return loss, logits.argmax(-1)

    inputs = Inputs()
    expected = function(inputs)
    actual, (record, *_) = run_compiled(function, inputs, logits="none")
    assert record.rewrites["chunk_losses"] == 1
    assert any("returned logits: lazy" in remark.text for remark in record.remarks)
    torch.testing.assert_close(actual, expected)


def test_an_optimiser_step_makes_lazy_logits_stale(model: Model) -> None:
    i = Inputs()
    compiled = torch.compile(model, backend="memopt", options=options())
    loss, lazy = compiled(i.x, i.y)
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    with pytest.raises(memopt.errors.StaleLogitsError, match=r"optimizer\.step"):
        lazy.argmax(-1)


def test_logits_made_without_gradients_are_returned_without() -> None:
    def function(i: Inputs) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = F.linear(i.x, i.w)
        return F.cross_entropy(flat(logits), i.y.view(-1)), logits

    inputs = Inputs()
    (loss, logits), (record,) = run_compiled(function, inputs)
    assert record.rewrites["chunk_losses"] == 1
    assert not loss.requires_grad
    assert not logits.requires_grad
    assert torch.equal(logits, function(inputs)[1])


def test_a_frozen_head_still_trains_a_temperature() -> None:
    inputs = Inputs()
    inputs.x.requires_grad_(False)
    inputs.w.requires_grad_(False)
    form = FORMS["temperature that is trained"]
    expected = gradients(form(inputs), inputs)
    actual, (record,) = run_compiled(form, inputs)
    assert record.rewrites["chunk_losses"] == 1
    assert_close(gradients(actual, inputs), expected)


def test_a_weight_stored_the_other_way_round_compiles_with_inductor() -> None:
    x = torch.randn(12, 8, requires_grad=True)
    w = torch.randn(8, 300, requires_grad=True)
    y = torch.randint(0, 300, (12,))

    def function(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(x @ w, y)

    expected = torch.autograd.grad(function(x, w), (x, w))
    actual = torch.autograd.grad(torch.compile(function, backend="memopt")(x, w), (x, w))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("chunk", [{"logits": "whole"}, {"chunk_rows": -1}, {"chunk_rows": 1.5}])
def test_an_impossible_option_is_refused_before_anything_is_compiled(chunk: Any) -> None:
    with pytest.raises(memopt.ConfigError, match=next(iter(chunk))):
        read_options(options(**chunk))


def test_two_runs_are_bitwise_equal() -> None:
    inputs = Inputs()
    runs = []
    for _ in range(2):
        torch._dynamo.reset()
        actual, _ = run_compiled(FORMS["padded, by count"], inputs, chunk_rows=5)
        runs.append((actual, *gradients(actual, inputs)))
    assert all(a is e or torch.equal(a, e) for a, e in zip(*runs, strict=True))


def test_double_backward_is_refused() -> None:
    inputs = Inputs()
    value = torch.ops.memopt.linear_cross_entropy(
        inputs.x.view(-1, HIDDEN), inputs.w, None, inputs.known.view(-1), None, -100, 0.0, 1.0,
        0.0, 8, [True, True, False], True,
    )[0]  # fmt: skip
    with pytest.raises(memopt.errors.DoubleBackwardError, match="second derivative"):
        torch.autograd.grad(value, inputs.x, create_graph=True)
