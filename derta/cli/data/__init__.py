"""`derta data ACTION`: record files checked, counted and built, one module an action."""
