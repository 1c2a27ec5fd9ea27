"""`derta reproduce ACTION`: the paper's experiments from the authors' own files."""
