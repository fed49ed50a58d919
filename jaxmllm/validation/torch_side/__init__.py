"""The reference's side of a validation: transformers' own PyTorch models. The only place that imports torch."""
