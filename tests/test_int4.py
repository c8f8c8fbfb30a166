"""Matrices of four bits: what they can hold, which scale they take, and rounding that minds the data."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import int4, mixed, packing


def weights(n_out=24, n_in=64, seed=0):
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed))


def inputs(n_in=64, rank=16, seed=1):
    """Inputs that lie near a plane, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mixed_up = torch.randn(400, rank, generator=generator) @ torch.randn(rank, n_in, generator=generator)
    return mixed_up + 0.1 * torch.randn(400, n_in, generator=generator)


@pytest.mark.parametrize("block", [0, 32])
def test_what_lies_on_the_grid_is_kept(block):
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(int4.LOWEST, int4.HIGHEST + 1, (16, 64), generator=generator)
    codes[:, ::32] = int4.HIGHEST  # without the largest code, a block's scale is anybody's guess
    scales = (1 + torch.rand(16, 2 if block else 1, generator=generator)).bfloat16().float()
    weight = codes * scales.repeat_interleave(block or 64, 1)
    packed = int4.pack(weight, block)
    assert packed.block == block
    assert torch.equal(packed.values(), weight)
    assert torch.equal(int4.pack(weight, block, torch.eye(64)).values(), weight)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), block=st.sampled_from([0, 32]), spread=st.floats(0, 3))
def test_codes_and_scales_are_what_the_runtime_reads(seed, block, spread):
    weight = weights(seed=seed) * torch.exp(spread * weights(n_in=1, seed=seed + 1))
    for energy in (None, inputs().T @ inputs()):
        packed = int4.pack(weight, block, energy)
        assert packed.codes.dtype == torch.int8
        assert int4.LOWEST <= packed.codes.min() <= packed.codes.max() <= int4.HIGHEST
        assert packed.scales.shape == (24, 2 if block else 1)
        assert packed.scales.min() > 0
        if block:
            assert torch.equal(packed.scales, packed.scales.bfloat16().float())
            assert torch.equal(packed.scales, packed.scales.half().float())


def test_a_row_of_zeros():
    packed = int4.pack(torch.zeros(3, 64), energy=torch.eye(64))
    assert torch.equal(packed.values(), torch.zeros(3, 64))


def test_the_best_scale_loses_no_more_than_the_largest_weights():
    weight = weights()
    blocks = weight.reshape(24, 2, 32)
    plain = blocks.abs().amax(-1, keepdim=True) / 7
    nearest = ((blocks / plain).round().clamp(-8, 7) * plain).reshape(24, 64)
    assert (int4.pack(weight).values() - weight).square().sum() < 0.95 * (nearest - weight).square().sum()


def test_small_blocks_lose_less_than_rows():
    weight = weights(n_in=512)
    lost = [(int4.pack(weight, block).values() - weight).square().sum() for block in (32, 0)]
    assert lost[0] < 0.7 * lost[1]


@pytest.mark.parametrize("block", [0, 32])
def test_rounding_minds_what_comes_in(block):
    """On other inputs of the same kind: what one column loses, others make up for."""
    weight, energy = weights(n_in=256), inputs(256, seed=1).T @ inputs(256, seed=1)
    seen = inputs(256, seed=1)
    plain, fitted = (int4.pack(weight, block, e).values() for e in (None, energy))
    lost = [float((seen @ (weight - rounded).T).square().sum()) for rounded in (plain, fitted)]
    assert lost[1] < 0.4 * lost[0]
    assert (fitted - weight).abs().max() < 20 * (plain - weight).abs().max()


def test_scales_fit_what_is_pushed_on_to_a_block():
    """The second half is zero, hears the same as the first, and has to make up for it."""
    weight, seen = weights(n_in=64), torch.randn(400, 64, generator=torch.Generator().manual_seed(3))
    weight[:, 32:], seen[:, 32:] = 0.0, seen[:, :32] + 0.01 * seen[:, 32:]
    plain, fitted = (int4.pack(weight, 32, energy).values() for energy in (None, seen.T @ seen))
    lost = [float((seen @ (weight - rounded).T).square().sum()) for rounded in (plain, fitted)]
    assert lost[1] < 0.3 * lost[0]


def test_bytes_are_those_in_the_file():
    packed = int4.pack(weights())
    codes = packing.two_a_byte(packed.codes.numpy())
    assert packed.n_bytes == len(codes) + packed.scales.numpy().astype(np.float16).nbytes


def test_two_codes_a_byte():
    codes = np.array([[-8, 7, 1], [-1, 0, 3]], np.int8)
    packed = np.frombuffer(packing.two_a_byte(codes), np.uint8)
    halves = np.stack([packed & 15, packed >> 4], 1).reshape(-1).astype(np.int8)
    assert np.where(halves > 7, halves - 16, halves).tolist() == codes.reshape(-1).tolist()
    assert len(packing.two_a_byte(codes[:1])) == 2


def test_the_error_is_that_of_the_outputs():
    weight, seen = weights(), inputs()
    rounded = int4.pack(weight).values()
    expected = (seen @ (weight - rounded).T).square().sum() / (seen @ weight.T).square().sum()
    assert mixed.output_error(weight, rounded, seen.T @ seen) == pytest.approx(float(expected), rel=1e-3)
    assert 0 < mixed.output_error(weight, mixed.in_eight_bits(weight), seen.T @ seen) < 1e-3
