"""Losses that never hold what they reduce: no logits, no matrix of similarities.

Each works ``chunk_rows`` rows at a time (by default memopt chooses), in plain PyTorch code or
inside ``torch.compile``, and gives the gradients of the formula in its docstring. Under autocast
inputs are cast as a linear layer casts its own. Losses are computed and returned in float32, or
float64 for float64. Where gradients are off no memory is set aside for them.

All raise ``ConfigError``, a ``ValueError``, for shapes, dtypes and options that do not fit, and
``DoubleBackwardError`` when a second derivative is asked for.
"""

import torch
from torch import Tensor

from memopt.kernels import inputs
from memopt.kernels.contrastive import Arguments
from memopt.kernels.cross_entropy_rows import ROWS
from memopt.kernels.divergence import reduced_divergence
from memopt.kernels.reduced_cross_entropy import checked_arguments, reduced_cross_entropy

__all__ = [
    "contrastive",
    "linear_cross_entropy",
    "linear_jsd",
    "linear_kl_div",
    "linear_log_probs",
]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """Cross-entropy of a linear layer's output, without that output.

    With ``z = scale * (hidden @ weight.T + bias)``, then ``softcap * tanh(z / softcap)`` if there
    is a cap, it is ``torch.nn.functional.cross_entropy(z, target)`` plus ``z_loss *
    logsumexp(z) ** 2`` of every row that counts.

    With ``reduction="none"`` or a ``z_loss`` the backward makes the logits a second time, a fourth
    matrix product. Otherwise the gradients come from the forward and the head costs its three.

    Args:
        hidden: `(..., H)`.
        weight: `(V, H)`, in the dtype of ``hidden``.
        target: classes `(...)`, int64 or uint8, or distributions `(..., V)`, floating point.
        bias: `(V,)`.
        class_weight: weight of each class, `(V,)`.
        reduction: ``"mean"`` over the rows that count, by the weights of their classes; ``"sum"``;
            or ``"none"``, with 0 for ignored rows.
        ignore_index: rows with this class count for nothing.
        label_smoothing: between 0 and 1.
        scale: factor on the product.
        softcap: bound on the logits; 0 for none.
        z_loss: factor on the squared log-sum-exps; their mean is over the rows that count.
        chunk_rows: rows whose logits exist at a time.

    Returns:
        A scalar, or `(...)` for ``"none"``.

    Raises:
        IndexError: a class is not in ``[0, V)``.

    Source: the z-loss is PaLM's (Chowdhery et al., 2022), the cap Gemma 2's (Gemma Team, 2024).
    """
    inputs.one_of("reduction", reduction, "mean", "sum", "none")
    inputs.within("z_loss", z_loss, 0)
    a = checked_arguments(
        inputs.head("", hidden, weight, bias),
        inputs.target(target, hidden.shape[:-1], len(weight)),
        class_weight,
        ignore_index,
        inputs.within("label_smoothing", label_smoothing, 0, 1),
        (scale, inputs.within("softcap", softcap, 0)),
        chunk_rows,
    )
    loss = reduced_cross_entropy(a, reduction, z_loss)
    return loss.view(hidden.shape[:-1]) if reduction == "none" else loss


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float = 0.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """Log-probability that a linear layer gives each target: what DPO, ORPO, KTO and GRPO reduce.

    It is ``log_softmax(z / temperature)`` at the target, with ``z`` as in
    ``linear_cross_entropy``. The backward makes the logits a second time.

    Args:
        hidden: `(..., H)`.
        weight: `(V, H)`, in the dtype of ``hidden``.
        target: classes `(...)`, int64 or uint8.
        bias: `(V,)`.
        temperature: divides the logits.
        ignore_index: rows with this class get 0.
        scale: factor on the product.
        softcap: bound on the logits; 0 for none.
        chunk_rows: rows whose logits exist at a time.

    Returns:
        `(...)`, at most 0.

    Raises:
        IndexError: a class is not in ``[0, V)``.
    """
    inputs.positive("temperature", temperature)
    a = checked_arguments(
        inputs.head("", hidden, weight, bias),
        inputs.target(target, hidden.shape[:-1], len(weight), soft=False),
        None,
        ignore_index,
        0.0,
        (scale / temperature, inputs.within("softcap", softcap, 0) / temperature),
        chunk_rows,
    )
    with inputs.no_autocast(hidden):
        values: Tensor = ROWS(*a)[0]
    return -values.view(target.shape)


def linear_kl_div(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    target: Tensor | None = None,
    reverse: bool = False,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    ignore_index: int = -100,
    scale: tuple[float, float] = (1.0, 1.0),
    softcap: tuple[float, float] = (0.0, 0.0),
    chunk_rows: int | None = None,
) -> Tensor:
    """Kullback-Leibler divergence between two linear layers' distributions: distillation.

    With ``p = softmax(z / temperature)`` of the student and ``q`` likewise of the teacher it is
    ``sum_v q_v (log q_v - log p_v)``, the forward divergence, or with ``reverse`` ``sum_v p_v
    (log p_v - log q_v)``. It is not multiplied by the temperature's square. The teacher is a
    constant: nothing of it gets a gradient.

    Args:
        hidden: the student's, `(..., H)`.
        weight: `(V, H)`, in the dtype of ``hidden``.
        teacher_hidden: `(..., H')`; size and dtype may differ from the student's.
        teacher_weight: `(V, H')`, in the dtype of ``teacher_hidden``.
        bias: the student's, `(V,)`.
        teacher_bias: `(V,)`.
        target: `(...)`, int64 or uint8, read only to leave out rows with ``ignore_index``.
        reverse: swap the two distributions.
        temperature: divides both logits.
        reduction: ``"batchmean"``, over the rows that count; ``"mean"``, over these and all
            classes; or ``"sum"``.
        ignore_index: rows with this class count for nothing.
        scale: factors on the student's product and on the teacher's.
        softcap: bounds on the student's logits and on the teacher's; 0 for none.
        chunk_rows: rows whose logits exist at a time.

    Returns:
        A scalar.

    Source: Hinton et al., 2015; reverse: MiniLLM (Gu et al., 2024).
    """
    return reduced_divergence(
        float(reverse),
        (hidden, weight, bias),
        (teacher_hidden, teacher_weight, teacher_bias),
        target,
        temperature=temperature,
        reduction=reduction,
        ignore_index=ignore_index,
        scale=scale,
        softcap=softcap,
        chunk_rows=chunk_rows,
    )


def linear_jsd(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    target: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    ignore_index: int = -100,
    scale: tuple[float, float] = (1.0, 1.0),
    softcap: tuple[float, float] = (0.0, 0.0),
    chunk_rows: int | None = None,
) -> Tensor:
    """Generalised Jensen-Shannon divergence between two linear layers' distributions.

    With the mixture ``m = beta q + (1 - beta) p`` it is ``beta KL(q || m) + (1 - beta) KL(p ||
    m)``. A ``beta`` of 0 stands for the forward divergence ``KL(q || p)``, 1 for the reverse.

    Everything else is as in ``linear_kl_div``.

    Returns:
        A scalar.

    Source: generalised knowledge distillation (Agarwal et al., 2024), in TRL's convention.
    """
    return reduced_divergence(
        inputs.within("beta", beta, 0, 1),
        (hidden, weight, bias),
        (teacher_hidden, teacher_weight, teacher_bias),
        target,
        temperature=temperature,
        reduction=reduction,
        ignore_index=ignore_index,
        scale=scale,
        softcap=softcap,
        chunk_rows=chunk_rows,
    )


def contrastive(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    both: bool = True,
    chunk_rows: int | None = None,
) -> Tensor:
    """Contrastive loss of paired embeddings, without the matrix of their similarities.

    With ``z = scale * x @ y.T`` and ``labels = arange(N)`` it is ``cross_entropy(z, labels)``, or
    with ``both`` the mean of that and ``cross_entropy(z.T, labels)``, as CLIP has it. One
    direction costs its three matrix products, both cost four.

    Args:
        x: `(N, D)`, normalised if the similarity is to be the cosine.
        y: `(N, D)`, row ``i`` paired with row ``i`` of ``x``; for one direction `(M, D)`, whose
            rows from ``N`` on are more negatives.
        scale: one over the temperature; a number, or a tensor with one element, which may be
            trained.
        both: whether to average both directions.
        chunk_rows: rows whose similarities exist at a time.

    Returns:
        A scalar.

    Source: InfoNCE (van den Oord et al., 2018); CLIP (Radford et al., 2021).
    """
    x, y, scale = inputs.pairs(x, y, scale, both=both)
    a = Arguments(
        x,
        y,
        scale,
        inputs.chunk_size(chunk_rows, len(x), len(y), x.device),
        inputs.wanted(x, y, scale),
        both,
    )
    with inputs.no_autocast(x):
        loss: Tensor = torch.ops.memopt.contrastive(*a)[0]
    return loss
