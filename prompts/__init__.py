"""Prompt pools and templates as data, and the code that reads them."""
