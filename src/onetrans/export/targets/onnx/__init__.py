"""The ONNX target: standard operators of opset 23, weights outside the graphs."""
