import pytest
import torch

from convert import precision


@pytest.mark.parametrize(
    ("has", "dtype"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True}, torch.bfloat16),
        ({"bf16": True}, torch.bfloat16),  # aarch64
        ({"amx_bf16": False, "avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_products_are_in_the_format_that_the_processor_has(monkeypatch, has, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    matrix = torch.eye(4)
    with precision.autocast():
        product = matrix @ matrix
    assert precision.processor_precision() == product.dtype == dtype
