"""What ships, and how it is opened: the ONNX and torch emitters, the artifact, its files' layers."""
