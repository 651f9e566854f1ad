"""The simulated caching allocator: sizes from the rules, golden traces written out by hand, conservation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from olmodebug.errors import UsageError
from olmodebug.footprint.allocator import (
    MIB,
    AllocatorSettings,
    CachingAllocator,
    OutOfMemory,
    rounded,
    segment_bytes,
    settings_from,
    settings_of,
)


@pytest.mark.parametrize(("size", "block"), [(1, 512), (512, 512), (513, 1024), (1000, 1024), (MIB, MIB), (MIB + 1, MIB + 512)])
def test_a_block_is_a_multiple_of_512(size: int, block: int) -> None:
    assert rounded(size) == block


@pytest.mark.parametrize(("size", "block"), [(1200 * 1024, 1280 * 1024), (MIB, MIB), (1900 * 1024, 2048 * 1024), (1000, 1024)])
def test_four_divisions_round_to_quarters_of_a_power_of_two(size: int, block: int) -> None:
    assert rounded(size, 4) == block


@pytest.mark.parametrize(
    ("block", "segment"),
    [(512, 2 * MIB), (MIB, 2 * MIB), (MIB + 512, 20 * MIB), (10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB), (11 * MIB, 12 * MIB)],
)
def test_a_segment_is_2_or_20_mib_or_the_block_rounded(block: int, segment: int) -> None:
    assert segment_bytes(block) == segment


def test_small_blocks_share_one_segment_and_large_ones_another() -> None:
    allocator = CachingAllocator()
    for key in range(4):
        allocator.malloc(key, 500_000)  # 500,224 each: four fit into 2 MiB
    assert (allocator.segments, allocator.reserved, allocator.allocated) == (1, 2 * MIB, 4 * 500_224)
    allocator.malloc("large", 5 * MIB)
    assert (allocator.segments, allocator.reserved) == (2, 22 * MIB)


def test_a_freed_block_is_used_again_and_the_segment_stays() -> None:
    allocator = CachingAllocator()
    allocator.malloc("a", 100 * MIB)
    allocator.free("a")
    assert (allocator.allocated, allocator.reserved) == (0, 100 * MIB)
    allocator.malloc("b", 60 * MIB)
    assert (allocator.allocated, allocator.reserved, allocator.largest_free) == (60 * MIB, 100 * MIB, 40 * MIB)


def test_a_block_left_in_the_middle_strands_what_is_around_it() -> None:
    """Two logits blocks are freed, an optimizer state takes a piece of one: the next logits need a segment of their own."""
    allocator = CachingAllocator()
    for key in ("first", "second"):
        allocator.malloc(key, 300 * MIB)
    allocator.free("first")
    allocator.free("second")
    allocator.malloc("state", 4 * MIB)
    allocator.malloc("third", 300 * MIB)
    allocator.malloc("fourth", 300 * MIB)
    assert (allocator.peak_reserved, allocator.allocated) == (900 * MIB + 0, 604 * MIB)
    expandable = CachingAllocator(AllocatorSettings(expandable_segments=True))
    for key in ("first", "second"):
        expandable.malloc(key, 300 * MIB)
    expandable.free("first")
    expandable.free("second")
    for key, size in (("state", 4), ("third", 300), ("fourth", 300)):
        expandable.malloc(key, size * MIB)
    assert expandable.peak_reserved == 620 * MIB  # 604 in pages of 20


def test_best_fit_takes_the_smallest_block_that_is_large_enough() -> None:
    allocator = CachingAllocator()
    for key, size in (("wide", 64), ("tight", 32)):
        allocator.malloc(key, size * MIB)
    allocator.free("wide")
    allocator.free("tight")
    allocator.malloc("new", 30 * MIB)
    assert allocator.largest_free == 64 * MIB


def test_free_neighbours_merge() -> None:
    allocator = CachingAllocator()
    for key in range(4):
        allocator.malloc(key, 4 * MIB)
    for key in (1, 3, 2):
        allocator.free(key)
    assert allocator.largest_free == 16 * MIB
    allocator.free(0)
    assert allocator.largest_free == 20 * MIB


def test_max_split_size_keeps_large_blocks_whole() -> None:
    allocator = CachingAllocator(AllocatorSettings(max_split_bytes=100 * MIB))
    allocator.malloc("large", 200 * MIB)
    allocator.free("large")
    allocator.malloc("small", 50 * MIB)
    assert allocator.reserved == 250 * MIB


def test_at_the_capacity_cached_segments_go_back_first() -> None:
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    allocator.malloc("a", 60 * MIB)
    allocator.free("a")
    allocator.malloc("b", 80 * MIB)
    assert (allocator.retries, allocator.reserved) == (1, 80 * MIB)


@pytest.mark.parametrize("expandable", [False, True])
def test_beyond_the_capacity_the_failing_request_is_told(expandable: bool) -> None:
    allocator = CachingAllocator(AllocatorSettings(expandable_segments=expandable), capacity_bytes=100 * MIB)
    allocator.malloc("a", 60 * MIB)
    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc("b", 50 * MIB)
    assert (caught.value.requested_bytes, caught.value.allocated_bytes) == (50 * MIB, 60 * MIB)
    assert caught.value.reserved_bytes <= 100 * MIB


def test_the_end_of_an_expandable_segment_is_the_last_choice() -> None:
    allocator = CachingAllocator(AllocatorSettings(expandable_segments=True))
    for key, size in (("hole", 50), ("keeper", 2), ("end", 40)):
        allocator.malloc(key, size * MIB)
    allocator.free("hole")
    allocator.free("end")
    allocator.malloc("new", 30 * MIB)  # fits the end (48 MiB) best, but the end can grow
    assert allocator.largest_free == 48 * MIB


@given(
    st.lists(st.tuples(st.integers(1, 40 * MIB), st.integers(0, 30)), max_size=60),
    st.booleans(),
    st.sampled_from([0, 4]),
    st.sampled_from([None, 60 * MIB]),
)
def test_bytes_are_conserved(requests: list[tuple[int, int]], expandable: bool, divisions: int, capacity: int | None) -> None:
    """Reserved is what is allocated and what is cached, after every step; in the end everything is cached."""
    settings = AllocatorSettings(expandable_segments=expandable, roundup_power2_divisions=divisions)
    allocator, live = CachingAllocator(settings, capacity_bytes=capacity), []
    for number, (size, pick) in enumerate(requests):
        try:
            allocator.malloc(number, size)
            live.append(number)
        except OutOfMemory:
            assert capacity is not None
        if live and pick % 3:
            allocator.free(live.pop(pick % len(live)))
        assert allocator.reserved == allocator.allocated + allocator.cached
        assert allocator.requested <= allocator.allocated <= allocator.peak_allocated
        assert capacity is None or allocator.reserved <= capacity
    for key in live:
        allocator.free(key)
    assert allocator.allocated == allocator.requested == 0
    assert allocator.reserved == allocator.cached
    allocator.empty_cache()
    assert allocator.reserved < 20 * MIB * 2 and (expandable or allocator.reserved == 0)


def test_the_new_environment_variable_goes_before_the_old_one() -> None:
    both = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}
    assert settings_of(both) == AllocatorSettings(expandable_segments=True)
    assert settings_of({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}).max_split_bytes == 128 * MIB
    assert settings_of({}) == AllocatorSettings()


@pytest.mark.parametrize("text", ["expandable_segments:perhaps", "max_split_size_mb:much", "no_such_option:1"])
def test_an_option_that_cannot_be_meant_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="PYTORCH_ALLOC_CONF"):
        settings_from(text)
