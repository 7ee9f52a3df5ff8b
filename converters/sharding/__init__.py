"""Cuts an ONNX net into stages that run on one device each, one after the other."""
