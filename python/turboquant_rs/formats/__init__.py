"""Files: packed tensors as safetensors."""
