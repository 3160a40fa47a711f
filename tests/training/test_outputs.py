"""Every form of a model's output, and a layer that is called twice."""

import warnings

import pytest
import torch

import fvae_kernels as fk
from tests.helpers.forwards import FORMS, assert_unused_or_same, branches, by_terms, trained
from tests.helpers.gradients import OPTIONS
from tests.helpers.total_loss import by_hand

pytestmark = pytest.mark.usefixtures("fixed_noise", "nothing_said")


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_of_output(form: str) -> None:
    """No warning: the loss is found. The layer outside its graph is in the loss and in the gradient."""
    model, call = branches(form)
    value, expected = by_terms(model, lambda: FORMS[form][1](call()), 0.5)
    assert all(g.abs().sum() > 0 for n, g in zip(trained(model), expected, strict=True) if n != "unused.adapter.B")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = call()
        loss = FORMS[form][1](output)
        (0.5 * loss).backward()
    assert type(output) is type(FORMS[form][0](torch.zeros(()), torch.zeros(3)))
    torch.testing.assert_close(loss.detach(), value)
    assert_unused_or_same(model, expected)


def test_terms_of_a_layer_that_is_called_twice_add_up() -> None:
    model, call = branches("mapping")
    with by_hand(model) as terms:
        call()
    call()
    logged = sum(values["loss"] for values in fk.collect_terms(model).values())
    assert logged * OPTIONS["loss_weight"] == pytest.approx(float(torch.stack(terms).sum()), rel=1e-9)
    assert len(terms) == 3
