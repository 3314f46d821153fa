"""The ONNX target: standard operators of opset 23, weights outside the graphs."""

from onetrans.export.targets.onnx.files import write
from onetrans.export.targets.onnx.graph import lower

__all__ = ["lower", "write"]
