"""Weights in and out: tables of tensor names, the safetensors reader, the Orbax store."""
