"""Data: procedurally generated scenes, the questions asked of them, and their files."""
