"""Commands that evaluate: `derta eval` and its actions."""
