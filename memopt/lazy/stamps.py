"""Whether a tensor is what it was: noticed by its version, its memory and a sample of it."""

from dataclasses import dataclass

import torch

from memopt.errors import StaleLogitsError


@dataclass(frozen=True)
class Stamp:
    """A tensor as it was at the forward.

    Attributes:
        name: what it is, for the error.
        tensor: the tensor.
        state: changes with every write that autograd knows of, and with the memory.
        sample: a few of its numbers: fused optimizers and ``.data`` write unseen by autograd.
    """

    name: str
    tensor: torch.Tensor
    state: tuple[int, int]
    sample: torch.Tensor

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> "Stamp":
        """The stamp of a tensor, whose graph it does not keep alive."""
        return cls(name, apart(tensor), _state(tensor), _sample(tensor))

    def check(self) -> None:
        """Raise if the tensor is not what it was.

        Raises:
            StaleLogitsError: it was changed in place, moved or freed.
        """
        same = _state(self.tensor) == self.state
        if not (same and torch.equal(_sample(self.tensor), self.sample)):
            raise StaleLogitsError(
                f"the logits were not kept and cannot be computed any more: {self.name} was "
                "changed in place, moved or freed since the forward. Read the logits before "
                "optimizer.step(), or have them kept with "
                'options={"passes": {"chunk_losses": {"logits": "keep"}}}'
            )


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without the graph that it was computed by: same memory, same version."""
    return tensor if tensor.grad_fn is None else tensor.detach()


def _state(tensor: torch.Tensor) -> tuple[int, int]:
    version = 0 if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr()


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Up to 16 rows and 16 columns of the first matrix, as bytes: so that NaN equals itself.

    On the CPU they lie in memory that is not the allocator's: the planner promises its bytes.
    """
    steps = [slice(None, None, max(1, -(-size // 16))) for size in tensor.shape[-2:]]
    first = [slice(1)] * (tensor.ndim - len(steps))
    with torch.no_grad():
        picked = tensor[tuple(first + steps)].clone(memory_format=torch.contiguous_format)
        taken = picked.view(torch.uint8)
        if taken.device.type != "cpu" or not taken.numel():
            return taken
        return torch.frombuffer(bytearray(taken.numpy().tobytes()), dtype=torch.uint8)
