"""What the stand-in for a GPU notes as waiting, and what a forward pass of each system makes the host wait for."""

from __future__ import annotations

import pytest
import torch

from adaptive_llava.training.stand_in_device import StandInDevice
from tests.conftest import IMAGE_TOKEN, MODELS_HERE, tiny_images, tiny_model


def calls(device: StandInDevice) -> list[str]:
    return [wait.call.rpartition(".")[2] for wait in device.waits]


@pytest.mark.parametrize(
    ("reads", "noted"),
    [
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.sum().item(), "item"),
        (lambda x: int((x > 1).sum()), "__int__"),
        (lambda x: bool((x > 1).any()), "__bool__"),
        (lambda x: x.cpu(), "cpu"),
        (lambda x: x.to("cpu"), "to"),
        (lambda x: x[x > 1], "__getitem__"),
        (lambda x: x[torch.tensor([0, 2])], "__getitem__"),
        (lambda x: (x > 1).nonzero(), "nonzero"),
        (lambda x: torch.where(x > 1), "where"),
        (lambda x: x.repeat_interleave(x), "repeat_interleave"),
        (lambda x: torch.tensor([1, 2], device=x.device), "tensor"),
        (lambda x: torch.ones(3).to(x.device), "to"),
        (lambda x: torch.ones(3).to(x), "to"),
    ],
)
def test_what_reads_the_device_on_the_host_is_noted_with_its_line(reads, noted):
    with StandInDevice() as device:
        reads(device.hold(torch.arange(3)))
    assert calls(device) == [noted]
    assert device.waits[0].line.startswith("tests/test_stand_in_device.py:")


@pytest.mark.parametrize(
    "computes",
    [
        lambda x: (x + 1).float().softmax(0) @ torch.eye(3, device=x.device),
        lambda x: x[1:].to(torch.float16).to(x.device),
        lambda x: torch.ones(3).to(x.device, non_blocking=True) * x,
        lambda x: x.repeat_interleave(2),
        lambda x: x[torch.tensor([0, 2]).to(x.device, non_blocking=True)],
        lambda x: torch.where(x > 1, x, 0),
        lambda x: torch.tensor([], device=x.device),
    ],
)
def test_what_stays_on_the_device_is_not_and_says_where_it_lies(computes):
    with StandInDevice() as device:
        result = computes(device.hold(torch.arange(3)))
        assert result.device.type == "cuda" and result.is_cuda
    assert device.waits == [] and result.device.type == "cpu"


def test_a_copy_on_the_host_is_on_the_host():
    with StandInDevice() as device:
        held = device.hold(torch.arange(3))
        copied = held.cpu()
        assert copied.device.type == "cpu" and copied.tolist() == [0, 1, 2] and held.is_cuda
        there = torch.arange(3)
        assert there.to(held.device, non_blocking=True).is_cuda and not there.is_cuda
    assert calls(device) == ["cpu"]


@pytest.mark.parametrize("preset", MODELS_HERE)
def test_a_forward_pass_waits_once_for_the_lengths(preset):
    model, images = tiny_model(preset), tiny_images(3)
    ids = torch.tensor([[5, IMAGE_TOKEN, 6, 7], [5, 6, IMAGE_TOKEN, 7], [IMAGE_TOKEN, 5, 6, 7]])
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=images).logits
        with StandInDevice() as device:
            device.adopt(model)
            found = model(input_ids=device.hold(ids.clone()), pixel_values=device.hold(images.clone())).logits
            assert found.is_cuda
            device.release(model)
    assert torch.equal(found, expected)
    ours = [wait for wait in device.waits if wait.line.startswith("modeling/")]
    assert [wait.call for wait in ours] == ["torch.Tensor.cpu"]
    # what is left waits inside transformers' language model, for the mask of padded rows or of pre-fusion
    others = [wait for wait in device.waits if wait not in ours]
    assert all("transformers/masking_utils.py" in wait.line for wait in others)
