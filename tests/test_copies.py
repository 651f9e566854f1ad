"""Copies of tensors are taken once, and say truly what stood there."""

import torch
from torch import Tensor, nn

from olmodebug.ranks.record import digest as rank_digest
from olmodebug.tracing.copies import Copies, Storages, digest, largest_magnitude


def test_two_tensors_have_one_number_exactly_where_they_share_memory() -> None:
    storages = Storages()
    base = torch.arange(6.0)
    assert storages.number(base) == storages.number(base[2:].view(2, 2)) == storages.number(base.detach()) != 0
    assert storages.number(base.clone()) != storages.number(base)
    assert storages.number(torch.eye(3).to_sparse()) == 0


def test_a_number_is_never_given_twice_though_memory_is() -> None:
    storages, numbers = Storages(), set()
    for _ in range(50):  # the allocator hands the same block out again and again
        numbers.add(storages.number(torch.empty(1000)))
    assert len(numbers) == 50


def test_a_tensor_is_copied_once_until_somebody_writes() -> None:
    storages = Storages()
    copies = Copies(storages, [])
    tensor = torch.arange(4.0)
    first, second = copies.of(tensor), copies.of(tensor)
    assert first is second
    copies.before_write(tensor)
    tensor[1:].zero_()
    storages.note_write(tensor[1:])
    third = copies.of(tensor)
    assert (first.tolist(), third.tolist()) == ([0, 1, 2, 3], [0, 0, 0, 0])


def test_a_parameter_is_lent_and_becomes_a_copy_when_it_is_written() -> None:
    storages = Storages()
    weight = nn.Parameter(torch.ones(2, 3))
    copies = Copies(storages, [weight])
    whole, turned = copies.of(weight), copies.of(weight.t())
    assert whole.data_ptr() == weight.data_ptr()
    copies.before_write(weight)
    with torch.no_grad():
        weight.zero_()
    storages.note_write(weight)
    assert whole.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert turned.tolist() == [[1, 1], [1, 1], [1, 1]]
    assert copies.of(weight).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_a_digest_counts_bits_and_order_and_nothing_else() -> None:
    values = torch.tensor([[1.0, -2.0, 3.0], [0.0, 5.0, -6.0]])
    assert digest(values) == digest(values.t().contiguous().t())
    assert digest(values) != digest(values.flip(0))
    assert digest(torch.zeros(2)) != digest(torch.ones(2))
    assert digest(torch.zeros(2)) != digest(-torch.zeros(2))
    for dtype in (torch.bfloat16, torch.bool, torch.int64, torch.complex64):
        one, two = values.to(dtype), values.to(dtype).clone()
        assert digest(one) == digest(two)
    assert digest(torch.empty(0)) == 0
    assert digest(torch.tensor(2.0)) != digest(torch.tensor(3.0))
    assert digest(torch.tensor(float("nan"))) == digest(torch.tensor(float("nan")))


def test_the_largest_magnitude_takes_no_sign_and_keeps_nan() -> None:
    def largest(*values: float, dtype: torch.dtype = torch.float32) -> float:
        return largest_magnitude(torch.tensor(values, dtype=dtype))

    assert largest(1.0, -7.0, 2.0) == 7.0
    assert largest(-1.0, 2.0) == 2.0
    assert largest(-1.0, float("-inf")) == float("inf")
    assert largest(1.0, float("nan")) != largest(1.0, float("nan"))
    assert largest(0.5, -4.0, dtype=torch.float8_e4m3fn) == 4.0


def test_copies_carry_no_history() -> None:
    x = torch.ones(3, requires_grad=True)
    copy: Tensor = Copies(Storages(), []).of(x * 2)
    assert not copy.requires_grad


def test_a_digest_takes_one_element_whatever_its_stride() -> None:
    one = torch.zeros(1, dtype=torch.long).as_strided((1,), (44,))
    assert one.is_contiguous(), "torch counts it as laid out in order"
    assert digest(one) == digest(torch.zeros(1, dtype=torch.long))
    assert rank_digest(one) == rank_digest(torch.zeros(1, dtype=torch.long))
