"""The arguments of later calls: the usual ones are taken at once, all others are compared with the first call's."""

import pytest
import torch
from torch import nn

from autopar.call import Call
from autopar.errors import BatchError

X, Y = torch.zeros(2, 3), torch.ones(2, 3)


class Two(nn.Module):
    def forward(self, a, b=None, **others):
        return a


class Positional(nn.Module):
    def forward(self, a, /):
        return a


class Many(nn.Module):
    def forward(self, *args):
        return args[0]


def same(found, expected):
    return len(found) == len(expected) and all(a is b for a, b in zip(found, expected))


def test_tensors_by_name_in_any_order():
    call = Call(Two(), (), {"a": X, "b": Y}, None)
    assert same(call.flatten((), {"b": Y, "a": X}), [X, Y])
    assert same(call.flatten((X,), {"b": Y}), [X, Y]) and same(call.flatten((X, Y), {}), [X, Y])
    with_loss = Call(Two(), (X,), {"target": Y}, lambda out, target: out.sum())
    assert same(with_loss.flatten((), {"target": Y, "a": X}), [X, Y])


@pytest.mark.parametrize(
    "kwargs, said",
    [
        ({"a": X}, "'b' is missing"),
        ({"a": X, "c": Y}, "'b' is missing"),
        ({"a": X, "b": Y, "c": Y}, "'c' is new"),
        ({"a": X, "b": Y.double()}, "'b' has torch.float64"),
        ({"a": X, "b": 1}, "'b' is a int"),
        ({"b": Y}, "does not fit Two.forward"),
    ],
)
def test_other_arguments_are_refused(kwargs, said):
    with pytest.raises(BatchError, match=said):
        Call(Two(), (), {"a": X, "b": Y}, None).flatten((), kwargs)


@pytest.mark.parametrize(
    "model, args, kwargs, later",
    [
        (Positional(), (X,), {}, {"a": X}),
        (Many(), (X,), {}, {"args[0]": X}),
        (Two(), ({"x": X},), {}, {"a.x": X}),
        (Two(), ([X],), {}, {"a[0]": X}),
    ],
    ids=["positional only", "rest", "dict", "list"],
)
def test_what_forward_would_refuse_is_refused(model, args, kwargs, later):
    with pytest.raises(BatchError):
        Call(model, args, kwargs, None).flatten((), later)


def test_values_are_compared():
    call = Call(Two(), (X,), {"b": 3}, None)
    assert same(call.flatten((), {"a": Y, "b": 3}), [Y])
    with pytest.raises(BatchError, match="now fixed in the graph"):
        call.flatten((), {"a": X, "b": 4})
