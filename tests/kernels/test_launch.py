"""How kernels are launched is a pure function; what the compiler makes of it is in test_compile.py."""

import dataclasses

import pytest

from kernels.launch import CAPABILITIES, AttentionShape, cross_attention_launch, self_attention_launch, split_width

WIDTHS = (2, 16, 32, 40, 64, 80, 96, 128, 160, 192, 256)


@pytest.mark.parametrize(
    ("width", "parts"),
    [
        (2, (16, 0)),
        (16, (16, 0)),
        (24, (16, 16)),
        (40, (32, 16)),
        (64, (64, 0)),
        (80, (64, 16)),
        (128, (128, 0)),
        (160, (128, 32)),
    ],
)
def test_a_width_is_split_without_padding_it(width, parts):
    assert split_width(width) == parts


def test_a_split_covers_every_width():
    for width in range(1, 257):
        main, tail = split_width(width)
        assert main + tail >= width
        assert main.bit_count() == 1
        assert tail == 0 or (tail.bit_count() == 1 and tail >= 16)
        # The padding is less than a tile of tensor cores, or less than half the width.
        assert main + tail - width < max(16, width / 2)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("queries", [1, 64, 256, 1024, 4096])
def test_every_launch_is_one_that_triton_takes(capability, element_bytes, queries):
    for width in WIDTHS:
        shape = AttentionShape(queries, width, element_bytes)
        for config in (
            self_attention_launch(shape, capability),
            self_attention_launch(shape, capability, portable=True),
            cross_attention_launch(shape),
        ):
            for size in (config.block_queries, config.block_tokens):
                assert size >= 16
                assert size.bit_count() == 1
            assert config.num_warps in (1, 2, 4, 8)
            assert config.num_stages >= 1
            # A warp takes 16 rows of queries; more warps than that share columns, up to two for a row.
            assert 16 * config.num_warps <= max(2 * config.block_queries, 64)


def test_few_queries_take_small_blocks():
    few, many = (self_attention_launch(AttentionShape(q, 160, 2), 90) for q in (256, 1024))
    assert few.block_queries < many.block_queries


def test_fp32_launches_do_not_depend_on_the_device():
    half = AttentionShape(4096, 80, 2)
    full = dataclasses.replace(half, element_bytes=4)
    assert self_attention_launch(full, 90) == self_attention_launch(full, 80) == cross_attention_launch(full)
    assert self_attention_launch(full, 90) != self_attention_launch(half, 90)
