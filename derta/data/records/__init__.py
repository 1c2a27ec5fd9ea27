"""Records: from files of any known format to triples, dialogues and requests."""
