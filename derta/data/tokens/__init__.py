"""Tokens: records as token ids, through the tokenizer and its chat template."""
