"""The port's side of a validation: production code, from the reference's inputs and from the prompts. No torch."""
