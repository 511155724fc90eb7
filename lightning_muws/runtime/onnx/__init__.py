"""Writes fast models as ONNX files, with our operators or plain."""
