"""What cannot be captured is refused with the user's line, the reason and what to change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autopar.capture import capture
from autopar.errors import BatchError, CaptureError


class Branch(nn.Linear):
    """Decides on the value of a tensor."""

    def forward(self, x):
        """Data-dependent."""
        y = super().forward(x).sum()
        if y > 0:  # the line to name
            return y
        return -y


class Item(nn.Linear):
    """Reads a number out of a tensor."""

    def forward(self, x):
        """Data-dependent."""
        return super().forward(x)[: int(x.sum().item())].sum()


class Mask(nn.Linear):
    """Selects by a boolean mask."""

    def forward(self, x):
        """A shape that depends on values."""
        y = super().forward(x)
        return y[y > 0].sum()


class Numpy(nn.Linear):
    """Leaves torch."""

    def forward(self, x):
        """numpy in the middle."""
        return super().forward(x).sum() + float(x.numpy().sum())


class Attribute(nn.Module):
    """Keeps a tensor on the side."""

    def __init__(self, *sizes):
        super().__init__()
        self.linear, self.last = nn.Linear(*sizes), torch.zeros(())

    def forward(self, x):
        """Assigns an attribute that the next call reads."""
        self.last = self.linear(x).sum() + self.last
        return self.last


class Average(nn.BatchNorm1d):
    """Running statistics as plain averages: their weight is read out of a tensor."""

    def __init__(self, *sizes):
        super().__init__(4, momentum=None)


class Strange(nn.Linear):
    """Returns something a graph cannot."""

    def forward(self, x):
        """An iterator."""
        return {"loss": super().forward(x).sum(), "it": iter([1])}


class InPlace(nn.Linear):
    """Writes into its argument."""

    def forward(self, x):
        """Changes x."""
        x.add_(1)
        return super().forward(x).sum()


class Detached(nn.Linear):
    """Nothing to train."""

    def forward(self, x):
        """No gradient."""
        return super().forward(x).detach().sum()


class Broken(nn.Linear):
    """Fails by itself."""

    def forward(self, x):
        """A shape error."""
        return super().forward(x[:, :2]).sum()


class Cond(nn.Linear):
    """A branch as a graph of its own."""

    def forward(self, x):
        """torch.cond."""
        y = super().forward(x)
        return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y * 3, (y,)).sum()


class Noise(torch.autograd.Function):
    """Draws in its backward."""

    @staticmethod
    def forward(ctx, x):
        """As it is."""
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        """Noise on the gradient."""
        return grad * torch.rand_like(grad)


class Noisy(nn.Linear):
    """A backward with random numbers of its own."""

    def forward(self, x):
        """The loss."""
        return Noise.apply(super().forward(x)).sum()


class Memory(nn.Linear):
    """A buffer that carries a gradient into the next step."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("memory", torch.zeros(4))

    def forward(self, x):
        """In place, with gradients."""
        y = super().forward(x)
        self.memory.add_(y.sum(0))
        return (y + self.memory).sum()


@pytest.mark.parametrize(
    "cls, parts",
    [
        (Branch, ["cannot capture Branch at", "test_capture_errors.py:", "if y > 0", "torch.where"]),
        (Item, ["cannot capture Item at", "test_capture_errors.py:", ".item()"]),
        (Mask, ["cannot capture Mask at", "test_capture_errors.py:", "boolean-mask", "torch.where"]),
        (Numpy, ["cannot capture Numpy at", "test_capture_errors.py:", "numpy"]),
        (Attribute, ["assigns the tensor attribute 'last'", "self.register_buffer('last', ...", "a later call"]),
        (Average, ["cannot capture Average at", "batchnorm.py", "float(self.num_batches_tracked)"]),
        (Cond, ["torch.cond", "cannot be split", "torch.where"]),
        (Noisy, ["the backward draws random numbers anew", "checkpointing"]),
        (Memory, ["buffer 'memory'", "torch.no_grad()"]),
        (Strange, ["output 'it' is a", "return tensors in tuples"]),
        (InPlace, ["changes one of its arguments in place", "x.clone()"]),
        (Detached, ["no output depends on a trainable parameter", "torch.no_grad"]),
        (Broken, ["cannot capture Broken at", "test_capture_errors.py:", "x[:, :2]"]),
    ],
)
def test_reasons_are_named(cls, parts):
    with pytest.raises(CaptureError) as caught:
        capture(cls(4, 4), (torch.randn(8, 4),))
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert caught.value.__cause__ is None, "the raw error of torch is shown as well"
    assert "Traceback" not in message and len(message.splitlines()) <= 3


def test_refused_arguments():
    model = nn.Linear(4, 4)
    with pytest.raises(CaptureError, match="argument 'input' requires a gradient"):
        capture(model, (torch.ones(2, 4, requires_grad=True),))
    with pytest.raises(CaptureError, match=r"numpy array; pass torch.from_numpy"):
        capture(model, (torch.ones(2, 4).numpy(),))
    with pytest.raises(BatchError, match=r"does not fit Linear.forward: missing a required argument: 'input'"):
        capture(model)
    frozen = nn.Linear(4, 4).requires_grad_(False)
    with pytest.raises(CaptureError, match="nothing to train"):
        capture(frozen, (torch.ones(2, 4),))
    assert capture(frozen, (torch.ones(2, 4),), training=False).sinks


def test_capture_survives_an_error():
    """A failed capture leaves no mode active and the model whole."""
    model = Branch(4, 4)
    with pytest.raises(CaptureError):
        capture(model, (torch.randn(8, 4),))
    assert type(model.weight) is nn.Parameter and type(torch.ones(1) + 1) is torch.Tensor
    model(torch.randn(8, 4)).backward()
