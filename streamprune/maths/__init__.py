"""Pure numerical code: tensors in, tensors out. No files and no models."""
