"""Objectives inside training libraries; importing a module here does not import its library."""
