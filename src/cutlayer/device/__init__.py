"""A client without PyTorch: an ONNX half with onnxruntime, NumPy codecs, and the same wire.

It takes part in B epochs, which need the forward pass alone, and in deployed inference. Nothing here imports PyTorch.
"""
