"""The settings of every command. Nothing here imports torch or transformers: help reads it."""
