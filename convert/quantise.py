"""Float .tflite -> int8 .tflite, through ai-edge-quantizer."""

from __future__ import annotations

from pathlib import Path

from . import recipe


def quantise(stage: recipe.Quantise, source: Path, target: Path) -> None:
    """Quantise the weights of `source` as the stage says."""
    from ai_edge_quantizer import quantizer
    from ai_edge_quantizer import recipe as recipes

    rules = recipes.dynamic_wi8_afp32()
    if stage.conv == "float32":
        rules.append({**rules[0], "operation": "CONV_2D", "algorithm_key": "no_quantize"})
    job = quantizer.Quantizer(str(source))
    job.load_quantization_recipe(rules)
    target.unlink(missing_ok=True)
    job.quantize().export_model(str(target))
