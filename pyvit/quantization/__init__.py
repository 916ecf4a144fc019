"""int8 inference on CPUs: :func:`quantize` replaces linear layers in place, :func:`dequantize` undoes it, :func:`save`
and :func:`load` are for files."""

from pyvit.quantization.convert import dequantize, quantize
from pyvit.quantization.files import load, save
from pyvit.quantization.report import LayerReport, QuantizationReport

__all__ = ["LayerReport", "QuantizationReport", "dequantize", "load", "quantize", "save"]
