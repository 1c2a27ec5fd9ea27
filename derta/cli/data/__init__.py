"""`derta data ACTION`: what can be asked of record files, one module an action."""
